//! Adapters' tensors in a safetensors file: what PEFT's folders and Kiln's have in common.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use kiln_quant_core::{
    files::NewFolder,
    safetensors_file::{Dtype, NewTensor, SafetensorsFile, Values, write_safetensors},
    write_atomically,
};

use crate::{
    AdapterConfig, AnyAdapter, CONFIG_FILE, KILN_CONFIG_FILE, KILN_WEIGHTS_FILE, Method, Targets,
    WEIGHTS_FILE,
    error::{Error, Result},
    json_fields::Problem,
    outline::Outline,
    outside::Outside,
    outside_tensors::OutsideTensors,
    part::{Description, FileShape, Part, Parts},
    stacked::Stacked,
};

/// How a file names tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// PEFT's.
    Peft,
    /// Kiln's own.
    Kiln,
}

impl Layout {
    /// A part of the adapter at `path`.
    fn part(self, part: Part, path: &str) -> String {
        match self {
            Self::Peft => part.peft_name(path),
            Self::Kiln => part.kiln_name(path),
        }
    }

    /// A parameter of the model by its name in checkpoints.
    pub(crate) fn parameter(self, name: &str) -> String {
        match self {
            Self::Peft => format!("base_model.model.{name}"),
            Self::Kiln => name.to_owned(),
        }
    }

    /// The whole table at `path`, which may have low-rank updates or rows of its own beside it.
    pub(crate) fn table(self, path: &str, updated: bool, with_rows: bool) -> String {
        let [plain, base, beside_rows] = self.tables(path);
        match (self, updated, with_rows) {
            (Self::Peft, true, _) => base,
            (Self::Peft, false, true) => beside_rows,
            _ => plain,
        }
    }

    /// All names that [`table`](Self::table) gives.
    pub(crate) fn tables(self, path: &str) -> [String; 3] {
        ["weight", "base_layer.weight", "token_adapter.base_layer.weight"]
            .map(|rest| self.parameter(&format!("{path}.{rest}")))
    }

    /// A and B of embedding or head.
    pub(crate) fn factors(self, path: &str, is_embedding: bool) -> [String; 2] {
        match (self, is_embedding) {
            (Self::Peft, true) => {
                ["lora_embedding_A", "lora_embedding_B"].map(|rest| self.parameter(&format!("{path}.{rest}")))
            }
            _ => [Part::A, Part::B].map(|part| self.part(part, path)),
        }
    }

    /// Rows of some tokens.
    pub(crate) fn rows(self, path: &str) -> String {
        match self {
            Self::Peft => self.parameter(&format!("{path}.token_adapter.trainable_tokens_delta")),
            Self::Kiln => format!("{path}.rows"),
        }
    }
}

/// A tensor of a file: name, sizes, values.
pub(crate) type Named = (String, Vec<usize>, Vec<f32>);

/// What a file should hold of one part.
struct Wanted {
    part: Part,
    /// As it is held, `[rows, columns]`.
    size: [usize; 2],
    name: String,
    shape: FileShape,
}

/// Reads the adapters that `config` asks for of the model with `outline`, but those that are `stacked`, and nothing else may be
/// there. `config_file` is named in errors.
pub(crate) fn read(
    file: &SafetensorsFile,
    config: &AdapterConfig,
    targets: &Targets,
    outline: &Outline,
    stacked: Stacked,
    layout: Layout,
    config_file: &str,
) -> Result<(BTreeMap<String, Parts>, Outside)> {
    let shapes: BTreeMap<&str, [usize; 2]> =
        outline.slots.iter().map(|(path, shape)| (path.as_str(), *shape)).collect();
    let (outside, used_outside) = Outside::read(file, layout, config, outline, targets)?;
    let one_by_one = targets.adapted.iter().filter(|target| !stacked.parts.contains_key(&target.path));
    let in_slots = one_by_one.filter_map(|target| {
        let shape = *shapes.get(target.path.as_str())?;
        let parts = config.describe(target, shape).parts(shape);
        let wanted = parts.into_iter().map(|(part, size)| Wanted {
            part,
            size,
            name: in_file(file, layout.part(part, &target.path)),
            shape: part.file_shape(size),
        });
        Some((target.path.as_str(), wanted.collect()))
    });
    let wanted: Vec<(&str, Vec<Wanted>)> = in_slots.collect();
    // All that the header tells, before anything is read.
    for wanted in wanted.iter().flat_map(|(_, parts)| parts) {
        check_header(file, &wanted.name, &wanted.shape)?;
    }
    let mut used: BTreeSet<&str> =
        wanted.iter().flat_map(|(_, parts)| parts).map(|w| w.name.as_str()).collect();
    used.extend(used_outside.iter().chain(&stacked.used).map(String::as_str));
    if let Some(name) = file.names().find(|name| !used.contains(name)) {
        let expected = format!(
            "tensors of the {} modules that {config_file} selects, and no more",
            targets.adapted.len()
        );
        return Err(file.wrong(name, expected, "a tensor that none of them uses").into());
    }
    let read = |(path, parts): &(&str, Vec<Wanted>)| {
        let parts = parts.iter().map(|wanted| Ok((wanted.part, read_part(file, wanted)?)));
        Ok(((*path).to_owned(), parts.collect::<Result<Parts>>()?))
    };
    let mut parts = wanted.iter().map(read).collect::<Result<BTreeMap<_, _>>>()?;
    parts.extend(stacked.parts);
    Ok((parts, outside))
}

/// The name that the tensor `name` has in the file: of an adapter on a multimodal checkpoint, whose text part the model is,
/// it holds that part's name too.
pub(crate) fn in_file(file: &SafetensorsFile, name: String) -> String {
    const TEXT: &str = "base_model.model.model.";
    const IN_WRAPPERS: [&str; 3] = [
        "base_model.model.model.language_model.",
        "base_model.model.language_model.model.",
        "base_model.model.model.language_model.model.",
    ];
    let rest = name.strip_prefix(TEXT).filter(|_| !file.contains(&name));
    let wrapped = rest.and_then(|rest| {
        IN_WRAPPERS.iter().map(|prefix| format!("{prefix}{rest}")).find(|name| file.contains(name))
    });
    wrapped.unwrap_or(name)
}

fn check_header(file: &SafetensorsFile, name: &str, shape: &[usize]) -> Result<()> {
    let kinds = [Dtype::F32, Dtype::F16, Dtype::BF16];
    let expected = format!("F32, F16 or BF16 {shape:?}");
    if !file.contains(name) {
        return Err(file.wrong(name, expected, "no such tensor").into());
    }
    match file.describe(name)? {
        (dtype, found) if kinds.contains(&dtype) && found == shape => Ok(()),
        (dtype, found) => Err(file.wrong(name, expected, format!("{dtype} {found:?}")).into()),
    }
}

/// The error for a tensor that isn't there.
pub(crate) fn missing(file: &SafetensorsFile, name: &str) -> Error {
    file.wrong(name, "a tensor of floating-point numbers", "no such tensor").into()
}

/// Reads a tensor of this shape, whose values must be finite.
pub(crate) fn read_tensor(file: &SafetensorsFile, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    check_header(file, name, shape)?;
    let (_, values) = file.read_f32(name)?;
    check_finite(name, &values).map_err(|problem| problem.in_file(file.path()))?;
    Ok(values)
}

fn read_part(
    file: &SafetensorsFile,
    Wanted { name, size: [rows, columns], shape, .. }: &Wanted,
) -> Result<Vec<f32>> {
    let values = read_tensor(file, name, shape)?;
    // Files hold `[columns, rows]`.
    Ok((0..*rows)
        .flat_map(|row| (0..*columns).map(move |column| (row, column)))
        .map(|(row, column)| values[column * rows + row])
        .collect())
}

fn check_finite(name: &str, values: &[f32]) -> std::result::Result<(), Problem> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => {
            Err(Problem::new(name, "finite values", format!("{} at index {index}", values[index])))
        }
        None => Ok(()),
    }
}

/// Refuses adapters that `config` doesn't ask for, because the file could then not be loaded again.
pub(crate) fn check_adapters(
    config: &AdapterConfig,
    adapters: &[(String, AnyAdapter)],
    outside: &OutsideTensors,
    layout: Layout,
) -> Result<()> {
    outside.check(config)?;
    let slots: Vec<(String, [usize; 2])> =
        adapters.iter().map(|(path, adapter)| (path.clone(), adapter.base_shape())).collect();
    let targets = config.select(&outside.outline(slots))?;
    if let Some(path) = outside.without_update(&targets).filter(|_| layout == Layout::Peft) {
        let expected = "a selection of modules that have adapters";
        return Err(Problem::new("targets", expected, format!("{path}, which has none")).argument());
    }
    for (path, shape, rank, scaling) in outside.updated() {
        let geometry = Method::lora().geometry(shape, rank);
        let found = Description { geometry, scaling, magnitudes: false };
        let expected = targets.get(&path).map(|target| config.describe(target, shape));
        if expected != Some(found) {
            let expected = expected.map_or("no adapter".to_owned(), |expected| expected.to_string());
            return Err(Problem::new(path, format!("{expected}, as configured"), found).argument());
        }
    }
    for (path, adapter) in adapters {
        let found = adapter.describe();
        let expected = targets.get(path).map(|target| config.describe(target, adapter.base_shape()));
        if expected != Some(found) {
            let expected = expected.map_or("no adapter".to_owned(), |expected| expected.to_string());
            return Err(Problem::new(path, format!("{expected}, as configured"), found).argument());
        }
    }
    Ok(())
}

/// A folder for an adapter, in which none of another kind stays behind.
///
/// # Errors
/// The operating system's.
pub(crate) fn new_folder(folder: &Path, outside: &OutsideTensors) -> Result<NewFolder> {
    let own = [CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin", KILN_CONFIG_FILE, KILN_WEIGHTS_FILE];
    let further = outside.files().iter().map(|(name, _)| name.as_str());
    let new = NewFolder::replacing(folder, &own.into_iter().chain(further).collect::<Vec<_>>())?;
    for (name, bytes) in outside.files() {
        write_atomically(&new.path().join(name), |file| std::io::Write::write_all(file, bytes))?;
    }
    Ok(new)
}

/// Writes the adapters' tensors and `further` ones in f32, which the host holds meanwhile.
pub(crate) fn write(
    path: &Path,
    adapters: &[(String, AnyAdapter)],
    further: Vec<Named>,
    outside: &OutsideTensors,
    layout: Layout,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let mut stored = outside.tensors(layout)?;
    stored.extend(further);
    for (name, _, values) in &stored {
        check_finite(name, values).map_err(|problem| problem.in_file(path))?;
    }
    for (module, adapter) in adapters {
        for (part, tensor) in adapter.parts() {
            let (name, size) = (layout.part(part, module), tensor.dims());
            let read = tensor.transpose().try_into_vec_as::<f32>();
            let values = read.map_err(|error| Error::io(path)(std::io::Error::other(error)))?;
            check_finite(&name, &values).map_err(|problem| problem.in_file(path))?;
            stored.push((name, part.file_shape(size), values));
        }
    }
    let tensors: Vec<NewTensor<'_>> = stored
        .iter()
        .map(|(name, shape, values)| NewTensor {
            name: name.clone(),
            shape: shape.clone(),
            values: Values::F32(values),
        })
        .collect();
    Ok(write_safetensors(path, &tensors, metadata)?)
}

/// Adapters by path, of whatever kind; clones share their tensors.
pub(crate) fn collect<'a, S: AsRef<str>, A: Clone + Into<AnyAdapter> + 'a>(
    adapters: impl IntoIterator<Item = (S, &'a A)>,
) -> Vec<(String, AnyAdapter)> {
    adapters.into_iter().map(|(path, adapter)| (path.as_ref().to_owned(), adapter.clone().into())).collect()
}
