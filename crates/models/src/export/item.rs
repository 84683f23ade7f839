//! A model as a list of named tensors, each brought to host memory when it is asked for.

use std::collections::BTreeMap;

use burn::{module::Param, tensor::Tensor};
use kiln_quant_core::{PackedTensor, PackedWeight, QuantLinear, Scheme, to_host};

use super::{FloatType, Format};
use crate::{
    Classifier, Decoder, Embedding, Error, Result, Slots,
    classifier::SCORE,
    config::{ModelConfig, TensorRole},
    families::StackedExperts,
    source::{DenseTensor, transposed},
};

/// A tensor of the model. It shares the model's memory.
pub(super) struct Item {
    /// The module's path, or the tensor's name for [`TensorRole::Plain`].
    pub path: String,
    pub role: TensorRole,
    stored: Stored,
}

#[allow(clippy::large_enum_variant)] // references to a model's tensors, a few hundred of them
enum Stored {
    Packed(PackedTensor),
    /// As the checkpoint has it, or transposed.
    Matrix(Tensor<2>, bool),
    /// Numbers with their sizes in the checkpoint: a scalar has none.
    Vector(Tensor<1>, Vec<usize>),
    /// The tensors of a block's experts in one.
    Experts(Stack),
}

/// A tensor in host memory, rows in the checkpoint's order.
pub(super) enum Host {
    Packed(PackedWeight),
    Dense(DenseTensor),
}

impl Item {
    /// The tensor's name in checkpoints.
    pub(crate) fn name(&self) -> String {
        match self.role {
            TensorRole::Plain => self.path.clone(),
            _ => format!("{}.weight", self.path),
        }
    }

    /// How the model holds it.
    pub(crate) fn scheme(&self) -> Scheme {
        match &self.stored {
            Stored::Packed(weight) => Scheme::Packed(*weight.scheme()),
            _ => Scheme::Dense,
        }
    }

    /// Whether the packed inputs stand in another order than the model's (act-order).
    pub(crate) fn is_permuted(&self) -> bool {
        matches!(&self.stored, Stored::Packed(weight) if weight.input_order.is_some())
    }

    /// Sizes in the checkpoint, outermost first.
    pub(crate) fn shape(&self) -> Vec<usize> {
        match &self.stored {
            Stored::Packed(weight) => {
                let [d_input, d_output] = weight.shape();
                vec![d_output, d_input]
            }
            Stored::Matrix(values, transposed) => {
                let [rows, columns] = values.dims();
                if *transposed { vec![columns, rows] } else { vec![rows, columns] }
            }
            Stored::Vector(_, shape) => shape.clone(),
            Stored::Experts(stack) => stack.shape(),
        }
    }

    /// Reads the tensor from its device; all values must be finite.
    pub(crate) fn host(&self) -> Result<Host> {
        let name = self.name();
        let dense = |values: Vec<f32>| {
            check_finite(&name, &values)?;
            Ok(Host::Dense(DenseTensor { shape: self.shape(), values }))
        };
        match &self.stored {
            Stored::Vector(values, _) => dense(to_host(&name, values.clone())?),
            Stored::Experts(stack) => dense(stack.values()?),
            Stored::Matrix(values, false) => dense(to_host(&name, values.clone())?),
            Stored::Matrix(values, true) => dense(to_host(&name, values.clone().transpose())?),
            Stored::Packed(weight) => {
                let weight = weight.to_host()?;
                check_finite(&format!("{}.scales", self.path), &weight.effective_scales())?;
                let offsets = weight.effective_offsets().unwrap_or_default();
                check_finite(&format!("{}.offsets", self.path), &offsets)?;
                Ok(Host::Packed(weight))
            }
        }
    }
}

impl Host {
    /// Row-major values in the checkpoint's layout.
    pub(crate) fn dense(&self) -> Vec<f32> {
        match self {
            Self::Packed(weight) => weight.dequantize(),
            Self::Dense(tensor) => tensor.values.clone(),
        }
    }
}

/// All tensors of `model`: tables, norms, linears in the order in which data flows, head.
///
/// # Errors
/// Updates of embedding or head, for which no format has a place.
pub(super) fn items(model: &Decoder<QuantLinear>) -> Result<Vec<Item>> {
    items_as(model, model.config().family.conv1d)
}

/// A classifier's: `items` of its model, with the score head in the place of the language model's.
pub(super) fn of_classifier(items: Vec<Item>, model: &Classifier<Decoder<QuantLinear>>) -> Vec<Item> {
    let mut list = List(items);
    let head = format!("{}.", model.model.config().family.names.head);
    list.0.retain(|item| !item.name().starts_with(&head));
    let score = Stored::Matrix(model.score.weight.val(), true);
    list.add(&format!("{SCORE}.weight"), TensorRole::Plain, score);
    list.0
}

/// As [`items`]; `conv1d` says whether dense linears stand as `[d_input, d_output]`.
pub(super) fn items_as(model: &Decoder<QuantLinear>, conv1d: bool) -> Result<Vec<Item>> {
    if !model.updates.is_empty() {
        return Err(Error::Argument {
            name: "model".into(),
            expected: "embedding and head with their updates merged".into(),
            found: "updates beside them".into(),
        });
    }
    let names = &model.config().family.names;
    let mut list = List(Vec::new());
    list.embedding(names.embedding, &model.embed_tokens);
    if let (Some(table), Some(learned)) = (&model.embed_positions, names.positions) {
        let name = format!("{}.weight", learned.path);
        list.add(&name, TensorRole::Plain, Stored::Matrix(table.val(), false));
    }
    if let (Some(inputs), Some(paths)) = (&model.per_layer, names.per_layer) {
        list.embedding(paths.embedding, &inputs.table);
    }
    for (path, norm) in model.norms() {
        for (name, values) in norm.parameters() {
            list.vector(&format!("{path}.{name}"), values);
        }
    }
    for (name, values) in model.matrices() {
        list.add(&name, TensorRole::Plain, Stored::Matrix(values.val(), false));
    }
    for (name, shape, values) in model.vectors() {
        list.add(&name, TensorRole::Plain, Stored::Vector(values.val(), shape));
    }
    let transposed = !conv1d;
    for (path, slot) in model.slots() {
        match slot {
            QuantLinear::Dense(linear) if model.stays_dense(&path) => {
                let stored = Stored::Matrix(linear.weight.val(), true);
                list.add(&format!("{path}.weight"), TensorRole::Plain, stored);
            }
            slot => list.linear(&path, TensorRole::Linear, slot, transposed),
        }
    }
    if let Some(head) = &model.lm_head {
        list.linear(names.head, TensorRole::Head, head, true);
    }
    Ok(list.0)
}

/// Tensors of experts that a family's files hold in one tensor.
struct Stack {
    /// For each expert its tensor, or those of gate and way in.
    experts: Vec<Vec<Item>>,
    /// Whether matrices stand as `[d_input, d_output]` and the channels of gate and way in alternate.
    interleaved: bool,
}

impl Stack {
    /// Sizes of what an expert has, rows one after the other: `[d_output, d_input]` or `[d_output]`.
    fn of_one(&self) -> Vec<usize> {
        let one = &self.experts[0];
        let mut shape = one[0].shape();
        shape[0] *= one.len();
        shape
    }

    fn shape(&self) -> Vec<usize> {
        let mut shape = self.of_one();
        if self.interleaved {
            shape.reverse();
        }
        shape.insert(0, self.experts.len());
        shape
    }

    fn values(&self) -> Result<Vec<f32>> {
        let shape = self.of_one();
        let width: usize = shape[1..].iter().product();
        let mut all = Vec::new();
        for items in &self.experts {
            let tensors = items.iter().map(|item| Ok(item.host()?.dense())).collect::<Result<Vec<_>>>()?;
            if !self.interleaved {
                all.extend(tensors.into_iter().flatten());
                continue;
            }
            let rows = shape[0] / tensors.len();
            let alternating =
                (0..rows).flat_map(|row| tensors.iter().map(move |values| &values[row * width..][..width]));
            let alternating: Vec<f32> = alternating.flatten().copied().collect();
            all.extend(transposed(&alternating, shape[0], width));
        }
        Ok(all)
    }
}

/// `items` as the family's own files name them: experts in stacks, where they are stacked there.
pub(super) fn stacked(items: Vec<Item>, config: &ModelConfig) -> Vec<Item> {
    let mut rest: BTreeMap<String, Item> = BTreeMap::new();
    let mut order = Vec::new();
    for item in items {
        order.push(item.name());
        rest.insert(item.name(), item);
    }
    let mut stacks = Vec::new();
    for index in 0..config.num_hidden_layers {
        let Some(part) = config.parts(index).experts() else { continue };
        let Some(StackedExperts { tensors, biases, interleaved }) = part.stacked else { continue };
        let count = config.experts.map_or(0, |experts| experts.count);
        for (names, kind) in [(tensors, "weight"), (biases, "bias")] {
            for (name, which) in names.into_iter().zip([&[0, 1][..], &[2]]) {
                let mut take = |expert: usize, which: usize| {
                    rest.remove(&format!("{}.{kind}", config.family.path(index, &part.path(expert, which))))
                };
                let one = |expert| which.iter().map(|which| take(expert, *which)).collect::<Option<Vec<_>>>();
                let experts: Option<Vec<_>> = (0..count).map(one).collect();
                let Some(experts) = experts.filter(|experts| !experts.is_empty()) else { continue };
                let stored = Stored::Experts(Stack { experts, interleaved });
                stacks.push(Item { path: config.family.path(index, name), role: TensorRole::Plain, stored });
            }
        }
    }
    let others = order.into_iter().filter_map(|name| rest.remove(&name)).collect::<Vec<_>>();
    others.into_iter().chain(stacks).collect()
}

struct List(Vec<Item>);

impl List {
    fn add(&mut self, path: &str, role: TensorRole, stored: Stored) {
        self.0.push(Item { path: path.into(), role, stored });
    }

    fn vector(&mut self, name: &str, values: &Param<Tensor<1>>) {
        let values = values.val();
        let shape = values.dims().to_vec();
        self.add(name, TensorRole::Plain, Stored::Vector(values, shape));
    }

    fn embedding(&mut self, path: &str, embedding: &Embedding) {
        let stored = match embedding {
            Embedding::Dense(table) => Stored::Matrix(table.weight.val(), false),
            Embedding::Packed(table) => Stored::Packed(table.clone()),
        };
        self.add(path, TensorRole::Embedding, stored);
    }

    fn linear(&mut self, path: &str, role: TensorRole, linear: &QuantLinear, transposed: bool) {
        let (stored, bias) = match linear {
            QuantLinear::Packed(linear) => (Stored::Packed(linear.weight.clone()), &linear.bias),
            QuantLinear::Dense(linear) => (Stored::Matrix(linear.weight.val(), transposed), &linear.bias),
        };
        self.add(path, role, stored);
        if let Some(bias) = bias {
            self.vector(&format!("{path}.bias"), bias);
        }
    }
}

fn check_finite(name: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(i) => Err(Error::Argument {
            name: name.into(),
            expected: "finite values".into(),
            found: format!("{} at element {i}", values[i]),
        }),
        None => Ok(()),
    }
}

/// `values` as they read back from `float`; what doesn't fit its range is refused.
pub(super) fn rounded(format: Format, name: &str, values: &[f32], float: FloatType) -> Result<Vec<f32>> {
    let result: Vec<f32> = values.iter().map(|&value| float.round(value)).collect();
    match result.iter().position(|value| !value.is_finite()) {
        Some(i) => Err(format.refuse(
            name,
            format!("values within the range of {}", float.name()),
            format!("{:e} at element {i}", values[i]),
        )),
        None => Ok(result),
    }
}

/// Scales and offsets of a weight for groups of `group` inputs of one output: blocks cut into pieces, their values
/// repeated.
pub(super) struct Groups {
    /// `[groups, d_output]`.
    pub scales: Vec<f32>,
    /// `[groups, d_output]`; those of a symmetric grid are not stored and so not here.
    pub offsets: Option<Vec<f32>>,
}

impl Groups {
    /// The pieces must not cross blocks: `group` divides the block's inputs, or the block is the whole column.
    pub(crate) fn of(weight: &PackedWeight, group: usize) -> Self {
        let scales = weight.effective_scales();
        let offsets = weight.effective_offsets().map(|offsets| spread(weight, &offsets, group));
        Self { scales: spread(weight, &scales, group), offsets }
    }
}

fn spread(weight: &PackedWeight, values: &[f32], group: usize) -> Vec<f32> {
    let block = weight.scheme.block;
    let [_, columns] = weight.scheme.scale_shape(weight.d_input, weight.d_output);
    let inputs = block.inputs_of(weight.d_input);
    (0..weight.d_input.div_ceil(group))
        .flat_map(|row| {
            let first = row * group / inputs * columns;
            (0..weight.d_output).map(move |output| values[first + output / block.outputs])
        })
        .collect()
}
