//! What is trained, and where.

use std::path::Path;

use crate::{
    CONFIG_FILE, InitLoraWeights, Method, PeftConfig, Pooling, QaLora, Result, Target, Targets,
    json_fields::Problem, part::Description,
};

/// A method and the options that all methods share: nominal rank, alpha, dropout and the selection of modules, under
/// PEFT's names.
///
/// ```
/// use kiln_adapters::{AdapterConfig, Method, PeftConfig, QBara, TargetModules};
/// let lora = PeftConfig::new(64, 16.0, TargetModules::AllLinear);
/// let config = AdapterConfig::new(Method::QBara(QBara { lambda: 2 }), lora);
/// config.validate()?;
/// # Ok::<(), kiln_adapters::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AdapterConfig {
    /// The method.
    pub method: Method,
    /// The rest. `use_qalora` is false here, whatever the method.
    pub lora: PeftConfig,
}

/// What PEFT's keys say, QA-LoRA included.
impl From<PeftConfig> for AdapterConfig {
    fn from(mut lora: PeftConfig) -> Self {
        let method = match lora.use_qalora {
            true => {
                Method::QaLora(QaLora { pool: lora.qalora_group_size, pooling: Pooling::AverageTimesGroups })
            }
            false => Method::Lora,
        };
        lora.use_qalora = false;
        Self { method, lora }
    }
}

impl AdapterConfig {
    /// `method` with the options `lora`.
    pub fn new(method: Method, lora: PeftConfig) -> Self {
        Self { method, lora }
    }

    /// The configuration of a PEFT folder of such adapters, where PEFT knows the method: LoRA with all its options, and
    /// QA-LoRA, whatever its pooling (saving converts the weights).
    ///
    /// # Errors
    /// Another method.
    pub fn to_peft(&self) -> Result<PeftConfig> {
        let mut config = self.lora.clone();
        match self.method {
            Method::Lora => {}
            Method::QaLora(QaLora { pool, .. }) => {
                (config.use_qalora, config.qalora_group_size) = (true, pool);
            }
            other => {
                let expected = "lora or qa-lora, which PEFT's folders can hold";
                return Err(Problem::new("method", expected, other.name()).argument());
            }
        }
        Ok(config)
    }

    /// Checks ranges and combinations.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) naming the first offending option, and
    /// [`Error::Unsupported`](crate::Error::Unsupported).
    pub fn validate(&self) -> Result<()> {
        self.lora.validate()?;
        let refuse = |key: &str, expected: &str, found: &str| {
            Err(Problem::new(key, expected, found.to_owned()).argument())
        };
        if self.lora.use_qalora {
            return refuse("use_qalora", "false; the method says it", "true");
        }
        if self.method == Method::Lora {
            return Ok(());
        }
        let name = self.method.name();
        if self.lora.use_dora {
            return refuse("use_dora", &format!("false for {name}"), "true");
        }
        if self.lora.init_lora_weights != InitLoraWeights::Kaiming {
            let found = self.lora.to_json()["init_lora_weights"].to_string();
            return refuse("init_lora_weights", &format!("true for {name}"), &found);
        }
        Ok(())
    }

    /// The modules among `slots` that get adapters, whose sizes the method's divide.
    ///
    /// # Errors
    /// [`Targets::resolve`]'s, and a size that doesn't divide.
    pub(crate) fn targets(&self, slots: &[(String, [usize; 2])]) -> Result<Targets> {
        self.validate()?;
        self.lora.supported(Path::new(CONFIG_FILE))?;
        let paths: Vec<&str> = slots.iter().map(|(path, _)| path.as_str()).collect();
        let targets = Targets::resolve(&self.lora, &paths, None)?;
        for target in &targets.adapted {
            if let Some((path, shape)) = slots.iter().find(|(path, _)| *path == target.path) {
                let problem = self.method.problem(path, *shape, target.r);
                problem.map_or(Ok(()), |problem| Err(problem.argument()))?;
            }
        }
        Ok(targets)
    }

    /// The adapter that `target`, a layer of `shape`, gets.
    pub(crate) fn describe(&self, target: &Target, shape: [usize; 2]) -> Description {
        Description {
            geometry: self.method.geometry(shape, target.r),
            scaling: target.scaling,
            magnitudes: self.method == Method::Lora && self.lora.use_dora,
        }
    }
}
