//! A packed weight on a device.

use burn::{
    module::{Module, Param, ParamId},
    tensor::{DType, Device, Int, Tensor, TensorData},
};

#[cfg(feature = "flex")]
use crate::ops::few_rows::StoredScales;
use crate::{
    Compute, DoubleScales, HostQuantizer, PackedWeight, QuantError, QuantScheme, Result, ScaleType, Scales,
    SuperBlocks, SuperLayout, SuperScales,
    fused::{self, LowRankSpec},
    host::unreadable,
    ints_to_host,
    ops::{self, PackedSpec},
    quantizers, to_host,
};

/// A packed weight as a Burn module: recorded, moved between devices; trained are at most its scales and offsets
/// ([`with_trained`](Self::with_trained)).
///
/// It stands for a dense `[d_input, d_output]`. Layouts as in [`packing`](crate::packing); codes are U32 words. The
/// tensors are made outside autodiff, so that they mix with any autodiff context.
///
/// On a device that lacks the scheme's float type (bf16 under WGSL), scales and offsets are held in f32; their values
/// stay those of the scheme.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use kiln_quant_core::{HostQuantizer, MinMax, PackedTensor};
/// let device = Device::flex();
/// // Two outputs of 64 inputs, as checkpoints store them: `[d_output, d_input]`.
/// let weight: Vec<f32> = (0..128).map(|i| (i as f32).sin()).collect();
/// let packed = MinMax.quantize("w", &weight, 64, 2, &"affine4:64".parse()?)?;
/// let packed = PackedTensor::new(&packed, &device);
/// let y = packed.forward(Tensor::<2>::ones([1, 64], &device));
/// assert_eq!(y.dims(), [1, 2]);
/// # Ok::<(), kiln_quant_core::Error>(())
/// ```
#[derive(Module, Debug)]
pub struct PackedTensor {
    /// Words `[code_rows, d_output]`.
    pub codes: Param<Tensor<2, Int>>,
    /// Scales `[block_rows, block_columns]`; double-quantized: nested scales `[1, ceil(scales / 256)]`; of integers: their
    /// factors `[factor_rows, d_output]`.
    pub scales: Param<Tensor<2>>,
    /// Offsets in the scales' shape.
    pub offsets: Option<Param<Tensor<2>>>,
    /// Double-quantized: four 8-bit scale codes per U32 word, output-major as in [`DoubleScales`]. Integer scales: their
    /// words, `[word_rows, d_output]` in one row.
    pub scale_codes: Option<Param<Tensor<1, Int>>>,
    /// Integer offsets: their words, as those of the scales.
    pub offset_codes: Option<Param<Tensor<1, Int>>>,
    /// Offsets in units of their scales, while scales are trained and offsets follow; then there are no `offsets`.
    pub zeros: Option<Param<Tensor<2>>>,
    /// Double-quantized: the offset of all scales, `[1]`.
    pub scale_offset: Option<Param<Tensor<1>>>,
    /// Packed row `k` stands for input `input_order[k]`.
    pub input_order: Option<Param<Tensor<1, Int>>>,
    /// The inverse permutation: input `i` stands in packed row `input_places[i]`. There is one where there is the other.
    input_places: Option<Param<Tensor<1, Int>>>,
    #[module(skip)]
    scheme: QuantScheme,
    #[module(skip)]
    size: [usize; 2],
    #[module(skip)]
    compute: Compute,
}

fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    // `Param::from_tensor` would ask for gradients.
    Param::initialized(ParamId::new(), tensor)
}

fn words<const D: usize>(words: Vec<u32>, shape: [usize; D], device: &Device) -> Param<Tensor<D, Int>> {
    // The type must be named: by default Burn would convert to the device's integer type.
    let tensor = Tensor::from_data(TensorData::new(words, shape), (device, DType::U32));
    Param::initialized(ParamId::new(), tensor)
}

/// A weight as checkpoints store it, `[d_output, d_input]`, and packed.
fn quantize(
    name: &str,
    weight: Tensor<2>,
    scheme: &QuantScheme,
    quantizer: &dyn HostQuantizer,
) -> Result<(Vec<f32>, PackedWeight)> {
    let [d_input, d_output] = weight.dims();
    let values = to_host(name, weight.transpose())?;
    let packed = quantizer.quantize(name, &values, d_input, d_output, scheme)?;
    Ok((values, packed))
}

impl PackedTensor {
    /// Moves `weight` to `device`.
    ///
    /// # Panics
    /// If the parts of `weight` don't fit together; call [`PackedWeight::validate`] on weights from outside.
    pub fn new(weight: &PackedWeight, device: &Device) -> Self {
        weight.validate("weight").unwrap_or_else(|error| panic!("{error}"));
        let device = &device.clone().without_autodiff();
        let shape = weight.scheme.scale_shape(weight.d_input, weight.d_output);
        let floats = |values: &[f32], shape: [usize; 2]| {
            let dtype = match weight.scheme.scales {
                ScaleType::F16 | ScaleType::Super4 | ScaleType::Super8
                    if device.supports_dtype(DType::F16) =>
                {
                    DType::F16
                }
                ScaleType::Bf16 if device.supports_dtype(DType::BF16) => DType::BF16,
                _ => DType::F32,
            };
            let data = TensorData::new(values.to_vec(), shape).convert_dtype(dtype);
            frozen(Tensor::from_data(data, (device, dtype)))
        };
        let line = |line: Vec<u32>| {
            let count = line.len();
            words(line, [count], device)
        };
        let indices = |values: Vec<i64>| {
            Param::initialized(ParamId::new(), Tensor::from_data(values.as_slice(), device))
        };
        let plain = weight.offsets.as_ref().map(|offsets| floats(offsets, shape));
        let (scales, scale_codes, scale_offset, offsets, offset_codes) = match &weight.scales {
            Scales::Plain(scales) => (floats(scales, shape), None, None, plain, None),
            Scales::Super(both) => {
                let factors = |blocks: &SuperBlocks| {
                    let [_, columns] = shape;
                    floats(&blocks.factors, [blocks.factors.len() / columns, columns])
                };
                let offsets = both.offsets.as_ref();
                (
                    factors(&both.scales),
                    Some(line(both.scales.words.clone())),
                    None,
                    offsets.map(factors),
                    offsets.map(|offsets| line(offsets.words.clone())),
                )
            }
            Scales::Double(double) => {
                let packed: Vec<u32> = double
                    .codes
                    .chunks(4)
                    .map(|chunk| chunk.iter().rev().fold(0, |word, &code| word << 8 | u32::from(code)))
                    .collect();
                let nested = floats(&double.nested, [1, double.nested.len()]);
                let offset = frozen(Tensor::from_data([double.offset], device));
                (nested, Some(line(packed)), Some(offset), plain, None)
            }
        };
        Self {
            codes: words(
                weight.codes.clone(),
                [weight.codes.len() / weight.d_output, weight.d_output],
                device,
            ),
            scales,
            offsets,
            scale_codes,
            offset_codes,
            zeros: None,
            scale_offset,
            input_order: weight
                .input_order
                .as_ref()
                .map(|order| indices(order.iter().map(|&input| i64::from(input)).collect())),
            input_places: weight.input_order.as_ref().map(|order| {
                let mut places = vec![0; order.len()];
                for (place, &input) in (0..).zip(order) {
                    places[input as usize] = place;
                }
                indices(places)
            }),
            scheme: weight.scheme,
            size: [weight.d_input, weight.d_output],
            compute: Compute::F32,
        }
    }

    /// Packs the dense `weight` `[d_input, d_output]`, inputs in their own order, on its device. `name` is for errors.
    ///
    /// # Errors
    /// As [`HostQuantizer::quantize`]; a device that can't be read.
    pub fn quantize(
        name: &str,
        weight: Tensor<2>,
        scheme: &QuantScheme,
        quantizer: &dyn HostQuantizer,
    ) -> Result<Self> {
        let (device, (_, packed)) = (weight.device(), quantize(name, weight, scheme, quantizer)?);
        Ok(Self::new(&packed, &device))
    }

    /// As [`quantize`](Self::quantize), with the distance from `weight`.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize).
    pub fn quantize_and_measure(
        name: &str,
        weight: Tensor<2>,
        scheme: &QuantScheme,
        quantizer: &dyn HostQuantizer,
    ) -> Result<(Self, QuantError)> {
        let (device, (values, packed)) = (weight.device(), quantize(name, weight, scheme, quantizer)?);
        Ok((Self::new(&packed, &device), quantizers::error(&values, &packed)))
    }

    /// The format.
    pub fn scheme(&self) -> &QuantScheme {
        &self.scheme
    }

    /// `[d_input, d_output]`.
    pub fn shape(&self) -> [usize; 2] {
        self.size
    }

    /// Bytes of codes, scales, offsets and input order in the scheme's types.
    pub fn storage_bytes(&self) -> usize {
        let order = if self.input_order.is_some() { 4 * self.size[0] } else { 0 };
        self.scheme.storage_bytes(self.size[0], self.size[1]) + order
    }

    /// Rounds operands of products from now on; [`Compute::F32`] until then.
    pub fn set_compute(&mut self, compute: Compute) {
        self.compute = compute;
    }

    /// What operands of products are rounded to.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// Whether the product is of `x` itself, in whatever form products read: not where inputs are put in order first.
    pub(crate) fn takes_operands(&self) -> bool {
        self.input_order.is_none()
    }

    pub(crate) fn spec(&self) -> PackedSpec {
        PackedSpec { compute: self.compute, ..PackedSpec::new(&self.scheme, self.size[0], self.size[1]) }
    }

    /// Scales `[block_rows, block_columns]` as the arithmetic sees them.
    pub fn effective_scales(&self) -> Tensor<2> {
        match (&self.scale_codes, &self.scale_offset) {
            (Some(codes), Some(offset)) => {
                let shape = self.scheme.scale_shape(self.size[0], self.size[1]);
                fused::double_scales(codes.val(), self.scales.val(), offset.val(), shape)
            }
            _ => self.of_integers(&self.scales, self.scale_codes.as_ref(), None),
        }
    }

    /// `values` themselves, or the integers in `codes` times them; of the given outputs, or of all.
    fn of_integers(
        &self,
        values: &Param<Tensor<2>>,
        codes: Option<&Param<Tensor<1, Int>>>,
        outputs: Option<&Tensor<1, Int>>,
    ) -> Tensor<2> {
        let picked = |tensor: Tensor<2>| match outputs {
            Some(outputs) => tensor.select(1, outputs.clone()),
            None => tensor,
        };
        let (Some(codes), Some(layout)) = (codes, self.scheme.super_layout(self.size[0], self.size[1]))
        else {
            return picked(values.val());
        };
        let mut words = codes.val().reshape([layout.word_rows(), layout.columns]);
        if let Some(outputs) = outputs {
            words = words.select(1, outputs.clone());
        }
        let factors = picked(values.val());
        let columns = factors.dims()[1];
        fused::super_scales(words, factors, SuperLayout { columns, ..layout })
    }

    /// Codes, and scales and offsets as the arithmetic sees them.
    pub(crate) fn parts(&self) -> (Tensor<2, Int>, Tensor<2>, Tensor<2>) {
        let scales = self.effective_scales();
        let offsets = self.offsets_beside(&scales, None);
        (self.codes.val(), scales, offsets)
    }

    /// Offsets as the arithmetic sees them, of the given blocks of outputs or of all; `scales`, where there are none.
    fn offsets_beside(&self, scales: &Tensor<2>, outputs: Option<&Tensor<1, Int>>) -> Tensor<2> {
        match (&self.offsets, &self.zeros) {
            (Some(offsets), _) => self.of_integers(offsets, self.offset_codes.as_ref(), outputs),
            (None, Some(zeros)) => {
                let zeros = zeros.val();
                scales.clone()
                    * match outputs {
                        Some(outputs) => zeros.select(1, outputs.clone()),
                        None => zeros,
                    }
            }
            (None, None) => scales.clone(),
        }
    }

    /// The input order and its inverse.
    pub(crate) fn order(&self) -> Option<[Tensor<1, Int>; 2]> {
        match (&self.input_order, &self.input_places) {
            (Some(order), Some(places)) => Some([order.val(), places.val()]),
            (None, None) => None,
            _ => panic!("a packed weight whose input order and its inverse aren't both there"),
        }
    }

    /// `x · W`: differentiable in `x`; the graph keeps references to the packed parts, no dense weight.
    ///
    /// # Shapes
    /// `[.., d_input]` → `[.., d_output]`.
    ///
    /// # Panics
    /// If the last size of `x` is not `d_input`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let x = match self.order() {
            Some([order, places]) => {
                let sizes = x.dims();
                let rows = sizes[..D - 1].iter().product::<usize>();
                match rows {
                    0 => x,
                    _ => fused::reordered(x.reshape([rows, sizes[D - 1]]), order, places).reshape(sizes),
                }
            }
            None => x,
        };
        #[cfg(feature = "flex")]
        if let Some(y) = self.few_rows(&x, false) {
            return y;
        }
        let (codes, scales, offsets) = self.parts();
        ops::packed_linear(x, codes, scales, offsets, self.spec())
    }

    /// [`Self::forward`] or [`Self::backward`], inputs in packed order, where they read scales as they are stored.
    #[cfg(feature = "flex")]
    fn few_rows<const D: usize>(&self, x: &Tensor<D>, transposed: bool) -> Option<Tensor<D>> {
        let mut sizes = x.dims();
        let rows = sizes[..D - 1].iter().product();
        let codes = self.scale_codes.as_ref()?;
        let scales = self.scales.val();
        let (form, offsets) = match (&self.scale_offset, self.scheme.super_layout(self.size[0], self.size[1]))
        {
            (Some(offset), _) => (StoredScales::Double, Some(offset.val().unsqueeze())),
            (None, layout) => (StoredScales::Integers(layout?), self.offsets.as_ref().map(Param::val)),
        };
        // After `train` a weight's device is one with a graph, though nothing of it is trained.
        let devices = [&x.device(), &scales.device()];
        if self.scheme.block.outputs > 1 || !ops::few_rows::taken(devices, rows, form) {
            return None;
        }
        let offsets = offsets.unwrap_or_else(|| scales.clone());
        let offset_codes = self.offset_codes.as_ref().unwrap_or(codes).val();
        let [from, to] = if transposed { [1, 0] } else { [0, 1] };
        assert_eq!(sizes[D - 1], self.size[from], "the last size of a packed product's operand");
        let y = ops::few_rows::few_rows(
            x.clone().reshape([rows, sizes[D - 1]]),
            self.codes.val(),
            [scales, offsets],
            [codes.val(), offset_codes],
            self.spec(),
            form,
            transposed,
        );
        sizes[D - 1] = self.size[to];
        Some(y.reshape(sizes))
    }

    /// [`forward`](Self::forward) with a [`low_rank`](fused::low_rank) update of its result, of many rows in one operation.
    ///
    /// # Shapes
    /// `x` `[rows, d_input]`, `a` `[d_input, rank]`, `b` `[rank, d_output]` → `[rows, d_output]`.
    ///
    /// # Panics
    /// If the sizes don't fit together.
    pub fn forward_low_rank(
        &self,
        x: Tensor<2>,
        a: Tensor<2>,
        b: Tensor<2>,
        update: LowRankSpec,
    ) -> Tensor<2> {
        #[cfg(any(feature = "flex", feature = "cube"))]
        if self.input_order.is_none() && fused::updates_in_one(&x, self.compute) {
            let ([d_input, d_output], rank) = (self.shape(), a.dims()[1]);
            let found = [x.dims()[1], a.dims()[0], b.dims()[0], b.dims()[1]];
            assert_eq!(
                found,
                [d_input, d_input, rank, d_output],
                "a low-rank update of {d_input}x{d_output}"
            );
            return fused::packed_low_rank(x, self.parts(), [a, b], self.spec(), update);
        }
        fused::low_rank(self.forward(x.clone()), x, a, b, update)
    }

    /// `dy · Wᵀ` without a graph: the gradient of [`forward`](Self::forward)'s input.
    ///
    /// # Shapes
    /// `[rows, d_output]` → `[rows, d_input]`.
    ///
    /// # Panics
    /// If the last size of `dy` is not `d_output`.
    pub fn backward(&self, dy: Tensor<2>) -> Tensor<2> {
        let dx = self.backward_packed(dy);
        match self.order() {
            Some([_, places]) => dx.select(1, places),
            None => dx,
        }
    }

    /// [`Self::backward`], inputs in packed order.
    fn backward_packed(&self, dy: Tensor<2>) -> Tensor<2> {
        #[cfg(feature = "flex")]
        if let Some(dx) = self.few_rows(&dy, true) {
            return dx;
        }
        let (codes, scales, offsets) = self.parts();
        ops::packed_linear_dx(dy, codes, scales, offsets, self.spec())
    }

    /// The dense weight `[d_input, d_output]`, inputs in their own order.
    pub fn dequantize(&self) -> Tensor<2> {
        let (codes, scales, offsets) = self.parts();
        let dense = ops::packed_dequantize(codes, scales, offsets, self.spec());
        match self.order() {
            Some([_, places]) => dense.select(0, places),
            None => dense,
        }
    }

    /// [`Self::dequantize`] without kernels: what tests compare with, and what other backends would run.
    pub fn dequantize_reference(&self) -> Tensor<2> {
        let (codes, scales, offsets) = self.parts();
        let dense = ops::reference::packed_dequantize(codes, scales, offsets, self.spec());
        match self.order() {
            Some([_, places]) => dense.select(0, places),
            None => dense,
        }
    }

    /// The dense rows of the given outputs, `[outputs, d_input]`: an embedding's lookup, unpacking only what is asked.
    pub fn outputs(&self, outputs: Tensor<1, Int>) -> Tensor<2> {
        let [count] = outputs.dims();
        let blocks = outputs.clone().div_scalar(self.scheme.block.outputs as i64);
        let scales = match self.scale_offset {
            Some(_) => self.effective_scales().select(1, blocks.clone()),
            None => self.of_integers(&self.scales, self.scale_codes.as_ref(), Some(&blocks)),
        };
        let offsets = self.offsets_beside(&scales, Some(&blocks));
        let spec = PackedSpec { outputs: 1, d_output: count, ..self.spec() };
        let dense = ops::packed_dequantize(self.codes.val().select(1, outputs), scales, offsets, spec);
        match self.order() {
            Some([_, places]) => dense.select(0, places),
            None => dense,
        }
        .transpose()
    }

    /// Back to host memory, for saving or exporting.
    ///
    /// # Errors
    /// If the device can't be read.
    pub fn to_host(&self) -> Result<PackedWeight> {
        let words = |tensor: Tensor<2, Int>| {
            tensor.try_into_vec_as::<u32>().map_err(|error| unreadable::<u32>("codes", error))
        };
        let blocks = |codes: &Param<Tensor<1, Int>>, factors: &Param<Tensor<2>>| {
            let words = words(codes.val().unsqueeze())?;
            Ok::<_, crate::Error>(SuperBlocks { words, factors: to_host("factors", factors.val())? })
        };
        let scales = match (&self.scale_codes, &self.scale_offset) {
            (Some(codes), Some(offset)) => {
                let [rows, columns] = self.scheme.scale_shape(self.size[0], self.size[1]);
                let words = words(codes.val().unsqueeze())?;
                Scales::Double(DoubleScales {
                    codes: words.iter().flat_map(|word| word.to_le_bytes()).take(rows * columns).collect(),
                    nested: to_host("scales_nested", self.scales.val())?,
                    offset: to_host("scale_offset", offset.val())?[0],
                })
            }
            (Some(codes), None) => {
                let offsets = self.offset_codes.as_ref().zip(self.offsets.as_ref());
                Scales::Super(SuperScales {
                    scales: blocks(codes, &self.scales)?,
                    offsets: offsets.map(|(codes, factors)| blocks(codes, factors)).transpose()?,
                })
            }
            _ => Scales::Plain(to_host("scales", self.scales.val())?),
        };
        let apart = self.offsets.as_ref().filter(|_| self.offset_codes.is_none());
        let following = self.zeros.as_ref().map(|zeros| self.scales.val() * zeros.val());
        let offsets = apart.map(Param::val).or(following);
        let offsets = offsets.map(|offsets| to_host("offsets", offsets)).transpose()?;
        let order =
            self.input_order.as_ref().map(|order| ints_to_host("input_order", order.val())).transpose()?;
        Ok(PackedWeight {
            scheme: self.scheme,
            d_input: self.size[0],
            d_output: self.size[1],
            codes: words(self.codes.val())?,
            scales,
            offsets,
            input_order: order.map(|order| order.into_iter().map(|input| input as u32).collect()),
        })
    }
}
