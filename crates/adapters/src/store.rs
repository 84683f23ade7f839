//! Adapters' tensors in a safetensors file: what PEFT's folders and Kiln's have in common.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use kiln_quant_core::{
    files::NewFolder,
    safetensors_file::{Dtype, NewTensor, SafetensorsFile, Values, write_safetensors},
};

use crate::{
    AdapterConfig, AnyAdapter, CONFIG_FILE, KILN_CONFIG_FILE, KILN_WEIGHTS_FILE, Targets, WEIGHTS_FILE,
    error::{Error, Result},
    json_fields::Problem,
    part::{FileShape, Part, Parts},
};

/// How a part of the adapter at a path is called.
pub(crate) type Naming = fn(Part, &str) -> String;

/// What a file should hold of one part.
struct Wanted {
    part: Part,
    /// As it is held, `[rows, columns]`.
    size: [usize; 2],
    name: String,
    shape: FileShape,
}

/// Reads the adapters that `config` asks for in `slots`, and nothing else may be there. `config_file` is named in errors.
pub(crate) fn read(
    file: &SafetensorsFile,
    config: &AdapterConfig,
    targets: &Targets,
    slots: &[(String, [usize; 2])],
    naming: Naming,
    config_file: &str,
) -> Result<BTreeMap<String, Parts>> {
    let shapes: BTreeMap<&str, [usize; 2]> =
        slots.iter().map(|(path, shape)| (path.as_str(), *shape)).collect();
    let wanted: Vec<(&str, Vec<Wanted>)> = targets
        .adapted
        .iter()
        .map(|target| {
            let parts =
                config.describe(target, shapes[target.path.as_str()]).parts(shapes[target.path.as_str()]);
            let wanted = parts.into_iter().map(|(part, size)| Wanted {
                part,
                size,
                name: in_file(file, naming(part, &target.path)),
                shape: part.file_shape(size),
            });
            (target.path.as_str(), wanted.collect())
        })
        .collect();
    // All that the header tells, before anything is read.
    for wanted in wanted.iter().flat_map(|(_, parts)| parts) {
        check_header(file, wanted)?;
    }
    let used: BTreeSet<&str> = wanted.iter().flat_map(|(_, parts)| parts).map(|w| w.name.as_str()).collect();
    if let Some(name) = file.names().find(|name| !used.contains(name)) {
        let expected =
            format!("tensors of the {} modules that {config_file} selects, and no more", wanted.len());
        return Err(file.wrong(name, expected, "a tensor that none of them uses").into());
    }
    let read = |(path, parts): &(&str, Vec<Wanted>)| {
        let parts = parts.iter().map(|wanted| Ok((wanted.part, read_part(file, wanted)?)));
        Ok(((*path).to_owned(), parts.collect::<Result<Parts>>()?))
    };
    wanted.iter().map(read).collect()
}

/// The name that the tensor `name` has in the file: of an adapter on a multimodal checkpoint, whose text part the model is,
/// it holds that part's name too.
fn in_file(file: &SafetensorsFile, name: String) -> String {
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

fn check_header(file: &SafetensorsFile, Wanted { name, shape, .. }: &Wanted) -> Result<()> {
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

fn read_part(
    file: &SafetensorsFile,
    Wanted { name, size: [rows, columns], .. }: &Wanted,
) -> Result<Vec<f32>> {
    let (_, values) = file.read_f32(name)?;
    check_finite(name, &values).map_err(|problem| problem.in_file(file.path()))?;
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
pub(crate) fn check_adapters(config: &AdapterConfig, adapters: &[(String, AnyAdapter)]) -> Result<()> {
    let slots: Vec<(String, [usize; 2])> =
        adapters.iter().map(|(path, adapter)| (path.clone(), adapter.base_shape())).collect();
    let targets = config.select(&slots)?;
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
pub(crate) fn new_folder(folder: &Path) -> Result<NewFolder> {
    let own = [CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin", KILN_CONFIG_FILE, KILN_WEIGHTS_FILE];
    Ok(NewFolder::replacing(folder, &own)?)
}

/// Writes the adapters' tensors in f32, which the host holds meanwhile.
pub(crate) fn write(
    path: &Path,
    adapters: &[(String, AnyAdapter)],
    naming: Naming,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let mut stored = Vec::new();
    for (module, adapter) in adapters {
        for (part, tensor) in adapter.parts() {
            let (name, size) = (naming(part, module), tensor.dims());
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
