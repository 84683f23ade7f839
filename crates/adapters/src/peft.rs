//! Adapter folders as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Factors are stored as `base_model.model.PATH.lora_A.weight` `[r, d_input]` and `.lora_B.weight` `[d_output, r]`,
//! where PATH is the module's name in the checkpoint. Source: PEFT 0.21's files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::Tensor;
use kiln_quant_core::safetensors_file::{Dtype, NewTensor, SafetensorsFile, Values, write_safetensors};

use crate::{
    CONFIG_FILE, Lora, LoraAttacher, PeftConfig, Targets,
    attach::Factors,
    error::{Error, Result},
    json_fields::Problem,
};

/// The name of the file of weights in an adapter folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// The names of A and B in the file.
fn names(path: &str) -> [String; 2] {
    ["A", "B"].map(|factor| format!("base_model.model.{path}.lora_{factor}.weight"))
}

/// An adapter folder on disk, open.
///
/// ```no_run
/// # fn example(slot_shapes: Vec<(String, [usize; 2])>) -> Result<(), kiln_adapters::Error> {
/// use kiln_adapters::PeftFolder;
/// let folder = PeftFolder::open("my-adapter")?;
/// for key in &folder.config().unknown_keys {
///     println!("unknown key {key}");
/// }
/// let attacher = folder.attacher(&slot_shapes, 42)?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct PeftFolder {
    config: PeftConfig,
    config_path: PathBuf,
    weights: SafetensorsFile,
}

impl PeftFolder {
    /// Reads the configuration in `folder` and the weights' header.
    ///
    /// # Errors
    /// A file that is missing or isn't what its name says, and a configuration that asks for what isn't implemented.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let config_path = folder.as_ref().join(CONFIG_FILE);
        let config = PeftConfig::read(&config_path)?;
        let weights = SafetensorsFile::open(folder.as_ref().join(WEIGHTS_FILE))?;
        Ok(Self { config, config_path, weights })
    }

    /// The configuration; its `unknown_keys` belong into a report.
    pub fn config(&self) -> &PeftConfig {
        &self.config
    }

    /// Reads the adapters for a model with the linears `slots`: their paths and `[d_input, d_output]`. `seed` decides
    /// the dropout of further training.
    ///
    /// Entries of the configuration that match no slot belong into a report: [`LoraAttacher::targets`] lists them.
    ///
    /// # Errors
    /// A configuration that selects none of `slots`; a module that it selects and that lacks one of its tensors, or
    /// has one of another shape or type; values that aren't finite; a tensor that no selected module uses.
    pub fn attacher(&self, slots: &[(String, [usize; 2])], seed: u64) -> Result<LoraAttacher> {
        let paths: Vec<&str> = slots.iter().map(|(path, _)| path.as_str()).collect();
        let targets = Targets::resolve(&self.config, &paths, None).map_err(|error| match error {
            Error::Argument { name, expected, found } => {
                Problem::new(name, expected, found).in_file(&self.config_path)
            }
            other => other,
        })?;
        let shapes: BTreeMap<&str, [usize; 2]> =
            slots.iter().map(|(path, shape)| (path.as_str(), *shape)).collect();
        let stored: Vec<Stored<'_>> = targets
            .adapted
            .iter()
            .map(|target| Stored::new(&target.path, shapes[target.path.as_str()], target.r))
            .collect();
        // All that the header tells, before anything is read.
        for (name, shape) in stored.iter().flat_map(Stored::tensors) {
            self.check(name, shape)?;
        }
        self.refuse_unused(&stored)?;
        let factors = stored
            .iter()
            .map(|stored| Ok((stored.path.to_owned(), self.read(stored)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        Ok(LoraAttacher::stored(self.config.clone(), targets, factors, seed))
    }

    fn refuse_unused(&self, stored: &[Stored<'_>]) -> Result<()> {
        let used: BTreeSet<&str> = stored.iter().flat_map(|s| &s.names).map(String::as_str).collect();
        match self.weights.names().find(|name| !used.contains(name)) {
            Some(name) => {
                let count = stored.len();
                let expected =
                    format!("A and B of the {count} modules that {CONFIG_FILE} selects, and no more");
                Err(self.weights.wrong(name, expected, "a tensor that none of them uses").into())
            }
            None => Ok(()),
        }
    }

    fn check(&self, name: &str, shape: [usize; 2]) -> Result<()> {
        let kinds = [Dtype::F32, Dtype::F16, Dtype::BF16];
        let expected = format!("F32, F16 or BF16 {shape:?}");
        if !self.weights.contains(name) {
            return Err(self.weights.wrong(name, expected, "no such tensor").into());
        }
        match self.weights.describe(name)? {
            (dtype, found) if kinds.contains(&dtype) && *found == shape => Ok(()),
            (dtype, found) => Err(self.weights.wrong(name, expected, format!("{dtype} {found:?}")).into()),
        }
    }

    fn read(&self, stored: &Stored<'_>) -> Result<Factors> {
        let read = |(name, shape)| -> Result<Vec<f32>> {
            let (_, values) = self.weights.read_f32(name)?;
            check_finite(name, &values).map_err(|problem| problem.in_file(self.weights.path()))?;
            Ok(transpose(&values, shape))
        };
        let [a, b]: [Result<_>; 2] = stored.tensors().map(read);
        Ok([a?, b?])
    }
}

fn check_finite(name: &str, values: &[f32]) -> std::result::Result<(), Problem> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => {
            Err(Problem::new(name, "finite values", format!("{} at index {index}", values[index])))
        }
        None => Ok(()),
    }
}

/// What the file should hold for one module.
struct Stored<'a> {
    path: &'a str,
    /// Of A and B.
    names: [String; 2],
    /// `[r, d_input]` and `[d_output, r]`.
    shapes: [[usize; 2]; 2],
}

impl<'a> Stored<'a> {
    fn new(path: &'a str, [d_input, d_output]: [usize; 2], r: usize) -> Self {
        Self { path, names: names(path), shapes: [[r, d_input], [d_output, r]] }
    }

    /// Names and shapes of A and B.
    fn tensors(&self) -> [(&str, [usize; 2]); 2] {
        let ([a, b], [shape_a, shape_b]) = (&self.names, self.shapes);
        [(a, shape_a), (b, shape_b)]
    }
}

/// `[rows, columns]` to `[columns, rows]`.
fn transpose(values: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

/// Writes `adapters`, by the paths of their modules, and the `config` that they were made with as a PEFT folder, which
/// is created if missing.
///
/// Each file is written to a temporary sibling and renamed, so that none is ever half-written. Weights are written as
/// F32, which the host holds meanwhile.
///
/// ```
/// # use burn::{nn::LinearConfig, tensor::Device};
/// # use kiln_adapters::{Adapted, Lora, LoraAttacher, PeftConfig, TargetModules, save_peft};
/// # let config = PeftConfig::new(4, 8.0, TargetModules::Names(vec!["up_proj".into()]));
/// # let attacher = LoraAttacher::new(&config, &[("up_proj".to_owned(), [16, 32])], 42)?;
/// # let slot = attacher.attach("up_proj", LinearConfig::new(16, 32).init(&Device::flex()))?;
/// # let model = [("up_proj", slot)];
/// # let for_each_slot = |mut f: Box<dyn FnMut(&str, &Adapted<_, Lora>) + '_>| model.iter().for_each(|(p, s)| f(p, s));
/// # let folder = tempfile::tempdir().unwrap();
/// let mut adapters = Vec::new();
/// // For a model of kiln-models: `model.for_each_slot(|path, slot| ..)`. Clones share their tensors.
/// # for_each_slot(Box::new(
/// |path, slot| adapters.extend(slot.adapter.clone().map(|lora| (path.to_owned(), lora)))
/// # ));
/// # ;
/// save_peft(folder.path(), attacher.config(), adapters.iter().map(|(path, lora)| (path, lora)))?;
/// # Ok::<(), kiln_adapters::Error>(())
/// ```
///
/// # Errors
/// An adapter that `config` doesn't select, or with another rank or scaling, because the folder could then not be
/// loaded again; two adapters of one path; values that aren't finite; the operating system's errors.
pub fn save_peft<'a, S: AsRef<str>>(
    folder: &Path,
    config: &PeftConfig,
    adapters: impl IntoIterator<Item = (S, &'a Lora)>,
) -> Result<()> {
    let config_path = folder.join(CONFIG_FILE);
    config.supported(&config_path)?;
    let adapters: Vec<(S, &Lora)> = adapters.into_iter().collect();
    let paths: Vec<&str> = adapters.iter().map(|(path, _)| path.as_ref()).collect();
    let targets = Targets::resolve(config, &paths, None)?;
    for (path, lora) in &adapters {
        check(&targets, path.as_ref(), lora)?;
    }
    let weights_path = folder.join(WEIGHTS_FILE);
    let mut factors = Vec::new();
    for (path, lora) in &adapters {
        for (name, factor) in names(path.as_ref()).into_iter().zip([&lora.lora_a, &lora.lora_b]) {
            let factor = factor.val().transpose();
            let (shape, values) = (factor.dims(), to_host(factor).map_err(Error::io(&weights_path))?);
            check_finite(&name, &values).map_err(|problem| problem.in_file(&weights_path))?;
            factors.push((name, shape, values));
        }
    }
    let tensors: Vec<NewTensor<'_>> = factors
        .iter()
        .map(|(name, shape, values)| NewTensor {
            name: name.clone(),
            shape: shape.into(),
            values: Values::F32(values),
        })
        .collect();
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    // As PEFT marks its files.
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(&weights_path, &tensors, &metadata)?;
    config.write(&config_path)
}

fn to_host(tensor: Tensor<2>) -> std::io::Result<Vec<f32>> {
    let data = tensor.try_into_data().map_err(std::io::Error::other)?;
    data.try_into_vec_as().map_err(std::io::Error::other)
}

fn check(targets: &Targets, path: &str, lora: &Lora) -> Result<()> {
    let found = format!("rank {} and scaling {}", lora.rank(), lora.scaling());
    match targets.get(path) {
        Some(target) if target.r == lora.rank() && target.scaling == lora.scaling() => Ok(()),
        Some(target) => {
            let expected = format!("rank {} and scaling {}, as configured", target.r, target.scaling);
            Err(Problem::new(path, expected, found).argument())
        }
        None => Err(Problem::new(path, "no adapter, as configured", found).argument()),
    }
}
