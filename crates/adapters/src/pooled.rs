//! Pool the inputs, map, repeat the outputs: the one computation behind every balanced-rank adapter.

use burn::{
    module::{Module, Param},
    tensor::Tensor,
};
use kiln_quant_core::{Compute, Place, Projection, fused};
use serde::{Deserialize, Serialize};

use crate::{Adapter, Dropout};

/// What a group of neighbouring inputs becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Pooling {
    /// Its mean.
    #[default]
    Average,
    /// Its sum.
    Sum,
    /// Its mean times the number of groups, which is how PEFT pools for QA-LoRA.
    AverageTimesGroups,
}

impl Pooling {
    /// The factor between a group's sum and what it becomes, for groups of `pool` among `d_input` inputs.
    pub fn factor(self, pool: usize, d_input: usize) -> f64 {
        match self {
            Self::Average => 1.0 / pool as f64,
            Self::Sum => 1.0,
            Self::AverageTimesGroups => (d_input / pool) as f64 / pool as f64,
        }
    }
}

/// How widely an adapter pools and repeats, and what lies between.
///
/// ```
/// use kiln_adapters::{Geometry, Pooling};
/// let q_bara = Geometry { pool: 2, repeat: 2, pooling: Pooling::Average, rank: Some(128) };
/// assert_eq!(q_bara.parameters([4096, 4096]), 64 * (4096 + 4096));
/// assert_eq!(q_bara.rank_bound([4096, 4096]), 128);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Neighbouring inputs that become one; divides the inputs.
    pub pool: usize,
    /// Neighbouring outputs that are the same; divides the outputs.
    pub repeat: usize,
    /// What becomes of a group of inputs.
    pub pooling: Pooling,
    /// The rank of two factors as stored; `None` for a single matrix.
    pub rank: Option<usize>,
}

impl Geometry {
    /// `[d_input / pool, d_output / repeat]`: the size of the trained map.
    pub fn map_shape(&self, [d_input, d_output]: [usize; 2]) -> [usize; 2] {
        [d_input / self.pool, d_output / self.repeat]
    }

    /// Trained values beside a linear layer of `[d_input, d_output]`.
    pub fn parameters(&self, shape: [usize; 2]) -> usize {
        let [rows, columns] = self.map_shape(shape);
        self.rank.map_or(rows * columns, |rank| rank * (rows + columns))
    }

    /// The largest rank that the change of the weight can have: pooling and repeating keep the rank of the map.
    pub fn rank_bound(&self, shape: [usize; 2]) -> usize {
        let [rows, columns] = self.map_shape(shape);
        rows.min(columns).min(self.rank.unwrap_or(usize::MAX))
    }
}

/// Two trained factors.
#[derive(Module, Debug)]
pub struct LowRank {
    /// A, `[d_input / pool, rank]`.
    pub a: Param<Tensor<2>>,
    /// B, `[rank, d_output / repeat]`.
    pub b: Param<Tensor<2>>,
}

/// One trained matrix.
#[derive(Module, Debug)]
pub struct Full {
    /// H, `[d_input / pool, d_output / repeat]`.
    pub h: Param<Tensor<2>>,
}

/// The trained map between pooled inputs and outputs before they are repeated.
#[derive(Module, Debug)]
pub enum Core {
    /// A · B.
    LowRank(LowRank),
    /// H.
    Full(Full),
}

impl Core {
    /// Factors A `[d_input / pool, rank]` and B `[rank, d_output / repeat]`, which require gradients.
    ///
    /// # Panics
    /// If A and B differ in rank.
    pub fn low_rank(a: Tensor<2>, b: Tensor<2>) -> Self {
        assert_eq!(a.dims()[1], b.dims()[0], "A {:?} and B {:?} differ in rank", a.dims(), b.dims());
        Self::LowRank(LowRank { a: Param::from_tensor(a), b: Param::from_tensor(b) })
    }

    /// A matrix `[d_input / pool, d_output / repeat]`, which requires gradients.
    pub fn full(h: Tensor<2>) -> Self {
        Self::Full(Full { h: Param::from_tensor(h) })
    }

    /// The map's `[inputs, outputs]`.
    fn shape(&self) -> [usize; 2] {
        let rows = |param: &Param<Tensor<2>>| param.lazy_shape().dims::<2>();
        match self {
            Self::LowRank(LowRank { a, b }) => [rows(a)[0], rows(b)[1]],
            Self::Full(Full { h }) => rows(h),
        }
    }

    fn rank(&self) -> Option<usize> {
        match self {
            Self::LowRank(LowRank { a, .. }) => Some(a.lazy_shape().dims::<2>()[1]),
            Self::Full(_) => None,
        }
    }

    /// A · B or H.
    pub fn matrix(&self) -> Tensor<2> {
        match self {
            Self::LowRank(LowRank { a, b }) => a.val().matmul(b.val()),
            Self::Full(Full { h }) => h.val(),
        }
    }
}

/// `y = base(x) + scaling · repeat(dropout(pool(x)) · map)`, the map trained in f32.
///
/// Pooling joins groups of `pool` neighbouring inputs, repeating makes `repeat` neighbouring outputs of each one
/// (a a b b c c); both without parameters. The methods that choose the numbers are [`QBara`](crate::QBara),
/// [`QaLora`](crate::QaLora), [`QaHira`](crate::QaHira) and [`QaBlora`](crate::QaBlora).
///
/// The change of the weight is `scaling · factor · map[i / pool, j / repeat]` at input i and output j, with
/// [`Pooling::factor`]: constant on tiles of `pool` inputs × `repeat` outputs. It merges into any dense weight, and into
/// a packed weight without loss where each block of that weight lies inside one tile
/// ([`PackedMerge`](crate::PackedMerge)).
///
/// # Memory
/// For the backward pass the graph keeps the pooled input (`d_input / pool` columns) and, with two factors, tensors of
/// `rank` columns; not `x`. Dropout adds a bool and a copy for each pooled element.
#[derive(Module, Debug)]
pub struct PooledAdapter {
    /// What is trained.
    pub core: Core,
    #[module(skip)]
    pool: usize,
    #[module(skip)]
    repeat: usize,
    #[module(skip)]
    pooling: Pooling,
    #[module(skip)]
    scaling: f64,
    dropout: Dropout,
}

impl PooledAdapter {
    /// An adapter that joins `pool` inputs by `pooling` and repeats outputs `repeat` times.
    ///
    /// # Panics
    /// If `pool` or `repeat` is 0.
    pub fn new(
        core: Core,
        [pool, repeat]: [usize; 2],
        pooling: Pooling,
        scaling: f64,
        dropout: Dropout,
    ) -> Self {
        assert!(pool > 0 && repeat > 0, "groups of {pool} inputs and {repeat} outputs");
        Self { core, pool, repeat, pooling, scaling, dropout }
    }

    /// The numbers of the adapter.
    pub fn geometry(&self) -> Geometry {
        Geometry { pool: self.pool, repeat: self.repeat, pooling: self.pooling, rank: self.core.rank() }
    }

    /// The factor of the repeated outputs: alpha over the nominal rank.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// `[d_input, d_output]` of the base.
    pub fn base_shape(&self) -> [usize; 2] {
        let [rows, columns] = self.core.shape();
        [rows * self.pool, columns * self.repeat]
    }

    /// The factor between the map and the change of the weight.
    pub fn update_factor(&self) -> f64 {
        self.scaling * self.pooling.factor(self.pool, self.base_shape()[0])
    }

    /// The same with its change of the weight multiplied by `factor`.
    #[must_use]
    pub fn scaled(mut self, factor: f64) -> Self {
        self.scaling *= factor;
        self
    }

    /// The same adapter under another pooling: what it computes stays, B (or H) takes the difference.
    #[must_use]
    pub fn with_pooling(mut self, pooling: Pooling) -> Self {
        let d_input = self.base_shape()[0];
        let factor = |pooling: Pooling| pooling.factor(self.pool, d_input);
        let ratio = factor(self.pooling) / factor(pooling);
        self.pooling = pooling;
        if ratio != 1.0 {
            let scaled = |param: Param<Tensor<2>>| param.map(|values| values.mul_scalar(ratio));
            self.core = match self.core {
                Core::LowRank(LowRank { a, b }) => Core::LowRank(LowRank { a, b: scaled(b) }),
                Core::Full(Full { h }) => Core::Full(Full { h: scaled(h) }),
            };
        }
        self
    }

    /// The change of the base's weight, `[d_input, d_output]`.
    pub fn update(&self) -> Tensor<2> {
        let [d_input, d_output] = self.base_shape();
        let [rows, columns] = self.core.shape();
        let map = self.core.matrix().mul_scalar(self.update_factor());
        map.reshape([rows, 1, columns, 1])
            .expand([rows, self.pool, columns, self.repeat])
            .reshape([d_input, d_output])
    }
}

/// `y + repeat(low · map)`.
fn add_repeated(y: Tensor<2>, low: Tensor<2>, map: Tensor<2>, repeat: usize, compute: Compute) -> Tensor<2> {
    let ([_, d_output], [_, columns]) = (y.dims(), map.dims());
    assert_eq!(d_output, columns * repeat, "{columns} outputs repeated {repeat} times beside {d_output}");
    if repeat == 1 {
        return fused::add_matmul(y, low, map, compute);
    }
    fused::add_repeated(y, fused::matmul(low, map, compute), repeat)
}

impl Adapter for PooledAdapter {
    fn adapt<P: Projection>(&self, base: &P, x: Tensor<2>, y: Tensor<2>) -> Tensor<2> {
        let (dtype, [_, d_input]) = (x.dtype(), x.dims());
        let expected = self.base_shape()[0];
        assert_eq!(d_input, expected, "inputs of x and of the adapter");
        let pooled = if self.pool == 1 { x } else { fused::sum_groups(x, self.pool) };
        let (pooled, compensation) = self.dropout.apply(pooled);
        // One factor for scaling, pooling and dropout, on the smallest tensor on the way.
        let factor = self.update_factor() * compensation;
        let compute = base.compute();
        let (low, map) = match &self.core {
            Core::LowRank(LowRank { a, b }) => (fused::matmul(pooled, a.val().cast(dtype), compute), b),
            Core::Full(Full { h }) => (pooled, h),
        };
        add_repeated(y, low.mul_scalar(factor), map.val().cast(dtype), self.repeat, compute)
    }

    fn merged_weight<P: Projection>(&self, base: &P) -> Tensor<2> {
        let weight = base.weight();
        let dtype = weight.dtype();
        weight + self.update().cast(dtype)
    }

    fn at(&self, place: Place) {
        self.dropout.at(place);
    }
}
