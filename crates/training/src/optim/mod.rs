//! Steps from gradients: an optimizer, and one for each group of parameters that has its own options.

mod adamw;
mod adamw8bit;
mod blockwise;
mod factor;
mod momentum;

use std::collections::HashMap;

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    optim::{GradientsParams, ModuleOptimizer},
    tensor::{DType, Tensor},
};
use serde::{Deserialize, Serialize};

use kiln_quant_core::{fused, stable_name};

use crate::{ParameterGroup, Result, Schedule, TrainerConfig, error::Problem};

/// What makes steps of gradients.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay (Loshchilov and Hutter 2019).
    #[default]
    AdamW,
    /// AdamW whose two averages are kept in 8 bits, in blocks of 256 (Dettmers et al. 2022; bitsandbytes' `AdamW8bit`): a
    /// quarter of the memory. Steps are computed in host memory, which costs transfers on a GPU.
    AdamW8Bit,
    /// Steps by the sign of an average (Chen et al. 2023), with [`TrainerConfig::betas`], of which 0.9 and 0.99 are usual.
    /// Wants a rate three to ten times smaller than AdamW's.
    Lion,
    /// Gradient descent.
    Sgd {
        /// Share of the earlier direction that is kept, 0 to below 1.
        momentum: f64,
    },
}

impl OptimizerKind {
    pub(crate) fn check(self) -> Result<()> {
        match self {
            Self::Sgd { momentum } if !(0.0..1.0).contains(&momentum) => {
                Err(Problem::new("optimizer.momentum", "a number from 0 to below 1", momentum).argument())
            }
            _ => Ok(()),
        }
    }

    fn build(self, config: &TrainerConfig, weight_decay: f32) -> ModuleOptimizer {
        match self {
            Self::AdamW => adamw::optimizer(config, weight_decay),
            Self::AdamW8Bit => adamw8bit::optimizer(config, weight_decay),
            Self::Lion => ModuleOptimizer::from(momentum::Lion { betas: config.betas, weight_decay }),
            Self::Sgd { momentum } => ModuleOptimizer::from(momentum::Sgd { momentum, weight_decay }),
        }
    }

    /// Type and shape of the state's tensor `name` for a parameter of `shape`; `None` if there is no such tensor.
    pub(crate) fn state_tensor(self, name: &str, shape: &[usize]) -> Option<(DType, Vec<usize>)> {
        match (self, name) {
            (Self::AdamW, "momentum.moment_1" | "momentum.moment_2")
            | (Self::Lion | Self::Sgd { .. }, momentum::NAME) => Some((DType::F32, shape.to_vec())),
            (Self::AdamW8Bit, name) => adamw8bit::state_tensor(name, shape),
            _ => None,
        }
    }
}

/// What makes a run's own optimizer, given the group whose parameters it is for.
pub(crate) type MakeOptimizer = dyn Fn(Option<&ParameterGroup>) -> ModuleOptimizer + Send + Sync;

/// The optimizers of a run: of the parameters in no group, then of each group.
#[derive(Clone)]
pub(crate) struct Optimizers {
    parts: Vec<(ModuleOptimizer, Schedule)>,
    /// Which part a parameter belongs to.
    part_of: HashMap<u64, usize>,
    /// Whether the optimizers multiply gradients by [`factor::of_step`] where [`fused::has_adamw`] says yes.
    multiply: bool,
}

impl Optimizers {
    /// Optimizers without states for the trained parameters of `model`.
    ///
    /// # Errors
    /// A group without parameters.
    pub(crate) fn new<M: Module>(
        model: &M,
        config: &TrainerConfig,
        own: Option<&MakeOptimizer>,
    ) -> Result<Self> {
        let groups = || std::iter::once(None).chain(config.groups.iter().map(Some));
        let part = |group: Option<&ParameterGroup>| {
            let decay = group.and_then(|group| group.weight_decay).unwrap_or(config.weight_decay);
            let optimizer = own.map_or_else(|| config.optimizer.build(config, decay), |make| make(group));
            Ok((optimizer, config.schedule_of(group)?))
        };
        let parts = groups().map(part).collect::<Result<Vec<_>>>()?;
        let mut assign = Assign { groups: &config.groups, path: Vec::new(), part_of: HashMap::new() };
        model.visit(&mut assign);
        let part_of = assign.part_of;
        for (index, group) in config.groups.iter().enumerate() {
            if !part_of.values().any(|part| *part == index + 1) {
                let expected = "trained parameters that no later group has";
                return Err(Problem::new(format!("group {}", group.pattern), expected, "none").argument());
            }
        }
        let multiply = own.is_none() && config.optimizer == OptimizerKind::AdamW;
        Ok(Self { parts, part_of, multiply })
    }

    pub(crate) fn len(&self) -> usize {
        self.parts.len()
    }

    pub(crate) fn part(&self, part: usize) -> &ModuleOptimizer {
        &self.parts[part].0
    }

    /// Changes a part's optimizer, for one with the states of a record.
    ///
    /// # Errors
    /// Those of `load`.
    pub(crate) fn try_map_part(
        &mut self,
        part: usize,
        load: impl FnOnce(ModuleOptimizer) -> Result<ModuleOptimizer>,
    ) -> Result<()> {
        self.parts[part].0 = load(self.parts[part].0.clone())?;
        Ok(())
    }

    /// Whose parameters a part has.
    pub(crate) fn owns(&self, part: usize, parameter: u64) -> bool {
        self.part_of.get(&parameter) == Some(&part)
    }

    /// The model after step `step`, counted from 0, along `gradients` times `factor`.
    pub(crate) fn step<M: Module>(
        &mut self,
        step: u64,
        model: M,
        gradients: GradientsParams,
        factor: f64,
    ) -> M {
        let to = (0..self.parts.len()).map(|_| GradientsParams::new()).collect();
        let mut deal =
            Deal { from: gradients, to, factor, multiplied: self.multiply, part_of: &self.part_of };
        model.visit(&mut deal);
        let parts = self.parts.iter_mut().zip(deal.to).filter(|(_, gradients)| !gradients.is_empty());
        factor::during(if self.multiply { factor } else { 1.0 }, || {
            parts.fold(model, |model, ((optimizer, schedule), gradients)| {
                optimizer.step(schedule.lr(step), model, gradients)
            })
        })
    }
}

/// Finds the part of every trained parameter.
struct Assign<'a> {
    groups: &'a [ParameterGroup],
    path: Vec<String>,
    part_of: HashMap<u64, usize>,
}

impl ModuleVisitor for Assign<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.val().is_require_grad() {
            let path = stable_name(&self.path);
            let part = self.groups.iter().rposition(|group| group.pattern.matches(&path));
            self.part_of.insert(param.id.val(), part.map_or(0, |group| group + 1));
        }
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

/// Gives every gradient, times a factor where the optimizer doesn't multiply by itself, to its part.
struct Deal<'a> {
    from: GradientsParams,
    to: Vec<GradientsParams>,
    factor: f64,
    /// See [`Optimizers`].
    multiplied: bool,
    part_of: &'a HashMap<u64, usize>,
}

impl ModuleVisitor for Deal<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.from.remove::<D>(param.id) {
            let part = self.part_of.get(&param.id.val()).copied().unwrap_or(0);
            let gradient = match self.multiplied && fused::has_adamw(&param.val()) {
                true => gradient,
                false => gradient.mul_scalar(self.factor),
            };
            self.to[part].register(ParamId::from(param.id.val()), gradient);
        }
    }
}
