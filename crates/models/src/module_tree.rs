//! Decoders and blocks as Burn modules.
//!
//! Written by hand because parts stand in lists: parameters get the paths that checkpoints give them, not positions.
//! Constants are not visited: they are no parameters.

use burn::{
    module::{Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor},
    tensor::Device,
};
use kiln_quant_core::{Projection, TableUpdates};

use crate::{Block, BlockPart, Decoder, PerLayerInputs, families::Part};

/// The container type that visitors are told.
const CONTAINER: &str = "Struct:Decoder";

fn visit_at<M: Module, V: ModuleVisitor>(visitor: &mut V, path: &[&str], module: &M) {
    path.iter().for_each(|name| visitor.enter_module(name, CONTAINER));
    module.visit(visitor);
    path.iter().rev().for_each(|name| visitor.exit_module(name, CONTAINER));
}

fn map_at<M: Module, V: ModuleMapper>(mapper: &mut V, path: &[&str], module: M) -> M {
    path.iter().for_each(|name| mapper.enter_module(name, CONTAINER));
    let module = module.map(mapper);
    path.iter().rev().for_each(|name| mapper.exit_module(name, CONTAINER));
    module
}

/// A block with `$call` made on each of its parts.
macro_rules! block {
    ($block:expr, |$part:ident| $call:expr) => {{
        let Block { table, parts } = $block;
        let parts = parts.into_iter().map(|part| match part {
            BlockPart::Norm($part) => BlockPart::Norm($call),
            BlockPart::Linear($part) => BlockPart::Linear($call),
            BlockPart::Vector($part) => BlockPart::Vector($call),
            BlockPart::Experts(experts) => {
                BlockPart::Experts(experts.into_iter().map(|expert| expert.map(|$part| $call)).collect())
            }
        });
        Block { table, parts: parts.collect() }
    }};
}

impl<P: Projection> Module for Block<P> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.parts.iter().fold(devices, |devices, part| match part {
            BlockPart::Norm(norm) => norm.collect_devices(devices),
            BlockPart::Linear(linear) => linear.collect_devices(devices),
            BlockPart::Vector(values) => values.collect_devices(devices),
            BlockPart::Experts(experts) => {
                experts.iter().flatten().fold(devices, |devices, linear| linear.collect_devices(devices))
            }
        })
    }

    fn fork(self, device: &Device) -> Self {
        block!(self, |part| part.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        block!(self, |part| part.to_device(device))
    }

    fn train(self) -> Self {
        block!(self, |part| part.train())
    }

    fn valid(&self) -> Self {
        block!(self.clone(), |part| part.valid())
    }

    fn materialize(self) -> Self {
        block!(self, |part| part.materialize())
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        for (entry, part) in self.table.iter().zip(&self.parts) {
            let path: Vec<&str> = entry.name().split('.').collect();
            if let (Part::Experts(entry), BlockPart::Experts(experts)) = (entry, part) {
                for (index, expert) in experts.iter().enumerate() {
                    for (kind, linear) in expert.iter().enumerate() {
                        let path = entry.path(index, kind);
                        visit_at(visitor, &path.split('.').collect::<Vec<_>>(), linear);
                    }
                }
            }
            match part {
                _ if entry.is_constant() => {}
                BlockPart::Norm(norm) => visit_at(visitor, &path, norm),
                BlockPart::Linear(linear) => visit_at(visitor, &path, linear),
                BlockPart::Vector(values) => visit_at(visitor, &path, values),
                BlockPart::Experts(_) => {}
            }
        }
    }

    fn map<V: ModuleMapper>(self, mapper: &mut V) -> Self {
        let Block { table, parts } = self;
        let parts = table.iter().zip(parts).map(|(entry, part)| {
            let path: Vec<&str> = entry.name().split('.').collect();
            match part {
                part if entry.is_constant() => part,
                BlockPart::Norm(norm) => BlockPart::Norm(map_at(mapper, &path, norm)),
                BlockPart::Linear(linear) => BlockPart::Linear(map_at(mapper, &path, linear)),
                BlockPart::Vector(values) => BlockPart::Vector(map_at(mapper, &path, values)),
                BlockPart::Experts(experts) => {
                    let Part::Experts(entry) = entry else { panic!("{entry:?} with experts") };
                    let mut one = |index, kind, linear| {
                        let path = entry.path(index, kind);
                        map_at(mapper, &path.split('.').collect::<Vec<_>>(), linear)
                    };
                    let experts = experts.into_iter().enumerate().map(|(index, [gate, up, down])| {
                        [one(index, 0, gate), one(index, 1, up), one(index, 2, down)]
                    });
                    BlockPart::Experts(experts.collect())
                }
            }
        });
        Block { table, parts: parts.collect() }
    }
}

impl<P: Projection> ModuleDisplayDefault for Block<P> {
    fn content(&self, content: Content) -> Option<Content> {
        let content = self.parts().fold(content, |content, (name, part)| match part {
            BlockPart::Norm(norm) => content.add(name, norm),
            BlockPart::Linear(linear) => content.add(name, linear),
            BlockPart::Vector(values) => content.add(name, values),
            BlockPart::Experts(experts) => {
                experts.iter().flatten().fold(content, |content, linear| content.add(name, linear))
            }
        });
        content.optional()
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl<P: Projection> ModuleDisplay for Block<P> {}

impl<P: Projection> Decoder<P> {
    /// Segments of a module's path, given its path in checkpoints.
    fn segments(&self, path: &'static str) -> Vec<&'static str> {
        self.config.family.module.segments(path).collect()
    }

    /// Those of the matrices beside a narrower embedding.
    fn projection_segments(&self) -> [Vec<&'static str>; 2] {
        let paths = self.config.family.names.projections.unwrap_or_default();
        paths.map(|path| self.segments(path).into_iter().chain(["weight"]).collect())
    }

    /// Those of what makes the inputs of single blocks: table, projection, norm.
    fn per_layer_segments(&self) -> [Vec<&'static str>; 3] {
        let Some(paths) = self.config.family.names.per_layer else { return Default::default() };
        let mut all = [paths.embedding, paths.projection, paths.norm].map(|path| self.segments(path));
        all[1].push("weight");
        all
    }
}

/// A decoder with `$call` made on each of its parts, `$path` being the segments of the part's path.
macro_rules! decoder {
    ($decoder:expr, |$path:ident, $part:ident| $call:expr) => {{
        let decoder = $decoder;
        let names = decoder.config.family.names;
        let [embedding, blocks, norm, head] =
            [names.embedding, names.blocks, names.final_norm, names.head].map(|path| decoder.segments(path));
        let positions = names.positions.map(|learned| decoder.segments(learned.path)).unwrap_or_default();
        let embedding_norm = names.embedding_norm.map(|path| decoder.segments(path)).unwrap_or_default();
        let [table, projection, inputs_norm] = decoder.per_layer_segments();
        let [first, last] = decoder.projection_segments();
        // Struct fields are evaluated in the order in which they stand.
        Decoder {
            embed_tokens: {
                let ($path, $part) = (&embedding, decoder.embed_tokens);
                $call
            },
            embed_positions: decoder.embed_positions.map(|$part| {
                let $path = &positions;
                $call
            }),
            embed_norm: decoder.embed_norm.map(|$part| {
                let $path = &embedding_norm;
                $call
            }),
            projections: decoder.projections.map(|[to, from]| {
                let to = {
                    let ($path, $part) = (&first, to);
                    $call
                };
                let from = {
                    let ($path, $part) = (&last, from);
                    $call
                };
                [to, from]
            }),
            per_layer: decoder.per_layer.map(|inputs| PerLayerInputs {
                table: {
                    let ($path, $part) = (&table, inputs.table);
                    $call
                },
                projection: {
                    let ($path, $part) = (&projection, inputs.projection);
                    $call
                },
                norm: {
                    let ($path, $part) = (&inputs_norm, inputs.norm);
                    $call
                },
            }),
            blocks: {
                let map_one = |(index, $part): (usize, Block<P>)| {
                    let index = index.to_string();
                    let $path: Vec<&str> = blocks.iter().copied().chain([index.as_str()]).collect();
                    $call
                };
                decoder.blocks.into_iter().enumerate().map(map_one).collect()
            },
            final_norm: {
                let ($path, $part) = (&norm, decoder.final_norm);
                $call
            },
            lm_head: decoder.lm_head.map(|$part| {
                let $path = &head;
                $call
            }),
            updates: TableUpdates {
                embedding: decoder.updates.embedding.map(|$part| {
                    let $path = &embedding;
                    $call
                }),
                head: decoder.updates.head.map(|$part| {
                    let $path = &head;
                    $call
                }),
                rows: decoder.updates.rows.map(|$part| {
                    let $path = &embedding;
                    $call
                }),
            },
            config: decoder.config,
            compute: decoder.compute,
            placement: decoder.placement,
        }
    }};
}

impl<P: Projection> Module for Decoder<P> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        let devices = self.embed_tokens.collect_devices(devices);
        let devices = self.embed_positions.collect_devices(devices);
        let devices = self.embed_norm.collect_devices(devices);
        let devices = self
            .projections
            .iter()
            .flatten()
            .fold(devices, |devices, matrix| matrix.collect_devices(devices));
        let devices = self.per_layer.iter().fold(devices, |devices, inputs| {
            let devices = inputs.table.collect_devices(devices);
            inputs.norm.collect_devices(inputs.projection.collect_devices(devices))
        });
        let devices = self.blocks.collect_devices(devices);
        let devices = self.final_norm.collect_devices(devices);
        let devices = self.lm_head.collect_devices(devices);
        self.updates.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self { placement: None, ..decoder!(self, |_path, part| part.fork(device)) }
    }

    fn to_device(self, device: &Device) -> Self {
        Self { placement: None, ..decoder!(self, |_path, part| part.to_device(device)) }
    }

    fn train(self) -> Self {
        decoder!(self, |_path, part| part.train())
    }

    fn valid(&self) -> Self {
        decoder!(self.clone(), |_path, part| part.valid())
    }

    fn materialize(self) -> Self {
        decoder!(self, |_path, part| part.materialize())
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        let names = self.config.family.names;
        visit_at(visitor, &self.segments(names.embedding), &self.embed_tokens);
        if let (Some(table), Some(learned)) = (&self.embed_positions, names.positions) {
            visit_at(visitor, &self.segments(learned.path), table);
        }
        if let (Some(norm), Some(path)) = (&self.embed_norm, names.embedding_norm) {
            visit_at(visitor, &self.segments(path), norm);
        }
        for (path, matrix) in self.projection_segments().iter().zip(self.projections.iter().flatten()) {
            visit_at(visitor, path, matrix);
        }
        if let Some(inputs) = &self.per_layer {
            let [table, projection, norm] = self.per_layer_segments();
            visit_at(visitor, &table, &inputs.table);
            visit_at(visitor, &projection, &inputs.projection);
            visit_at(visitor, &norm, &inputs.norm);
        }
        let blocks = self.segments(names.blocks);
        for (index, block) in self.blocks.iter().enumerate() {
            let index = index.to_string();
            let path: Vec<&str> = blocks.iter().copied().chain([index.as_str()]).collect();
            visit_at(visitor, &path, block);
        }
        visit_at(visitor, &self.segments(names.final_norm), &self.final_norm);
        visit_at(visitor, &self.segments(names.head), &self.lm_head);
        visit_at(visitor, &self.segments(names.embedding), &self.updates.embedding);
        visit_at(visitor, &self.segments(names.head), &self.updates.head);
        visit_at(visitor, &self.segments(names.embedding), &self.updates.rows);
    }

    #[allow(clippy::needless_borrow, reason = "some paths are slices, others vectors")]
    fn map<V: ModuleMapper>(self, mapper: &mut V) -> Self {
        decoder!(self, |path, part| map_at(mapper, &path, part))
    }
}

impl<P: Projection> ModuleDisplayDefault for Decoder<P> {
    fn content(&self, content: Content) -> Option<Content> {
        content
            .add("embed_tokens", &self.embed_tokens)
            .add("embed_norm", &self.embed_norm)
            .add("blocks", &self.blocks)
            .add("final_norm", &self.final_norm)
            .add("lm_head", &self.lm_head)
            .optional()
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl<P: Projection> ModuleDisplay for Decoder<P> {}
