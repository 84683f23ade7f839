//! The specification's vectors for forward passes, gradients, training and counts.

use burn::{
    module::{Module, Param},
    nn::Linear,
    optim::{AdamWConfig, GradientsParams},
    tensor::{Device, Tensor},
};
use kiln_adapters::{
    Adapted, Adapter, AnyAdapter, Core, Dropout, Full, Geometry, Lora, LowRank, Method, PooledAdapter,
    Pooling, QBara, QaBlora, QaHira, QaLora,
};
use kiln_quant_core::{Place, Projection};
use kiln_testkit::{assert_close, kept, read, relative_difference, tensor};
use serde_json::Value;

use crate::vectors::{floats, linear, matrix, open, size};

/// Of the forward vectors, which are whole numbers and quarters.
const TOLERANCE: f32 = 1e-6;

pub(crate) fn no_dropout() -> Dropout {
    Dropout::new(0.0, "", 0)
}

/// The adapter of `method` with the matrices of `params`, stored in the papers' orientation.
fn pooled(method: Method, case: &Value, params: &Value, shape: [usize; 2], device: &Device) -> PooledAdapter {
    let scaling = case["scaling"].as_f64().unwrap();
    let geometry = method.geometry(shape, case["r"].as_u64().unwrap_or(1) as usize);
    let transposed = |name: &str| matrix(&params[name], device).transpose();
    let core = match geometry.rank {
        Some(_) => Core::low_rank(transposed("A"), transposed("B")),
        None => Core::full(transposed("H")),
    };
    let adapter =
        PooledAdapter::new(core, [geometry.pool, geometry.repeat], geometry.pooling, scaling, no_dropout());
    assert_eq!((adapter.geometry(), adapter.base_shape()), (geometry, shape));
    adapter
}

fn adapter(name: &str, case: &Value, shape: [usize; 2], device: &Device) -> (AnyAdapter, Geometry) {
    let p = |key: &str| size(&case[key]);
    let method = match name {
        "lora" => {
            let transposed = |name: &str| matrix(&case["params"][name], device).transpose();
            let scaling = case["scaling"].as_f64().unwrap();
            let lora = Lora::new(transposed("A"), transposed("B"), scaling, no_dropout());
            return (lora.into(), Method::lora().geometry(shape, p("r")));
        }
        "qbara" => Method::QBara(QBara { lambda: p("lambda_") }),
        "qalora_avg" => Method::QaLora(QaLora { pool: p("group"), pooling: Pooling::Average }),
        "qalora_sum" => Method::QaLora(QaLora { pool: p("group"), pooling: Pooling::Sum }),
        "qahira" => Method::QaHira(QaHira::for_tiles(p("repeat_out"), p("pool_in"))),
        "qablora_generalised" => {
            let (pool, repeat) = (p("pool_in"), p("repeat_out"));
            Method::QaBlora(QaBlora { pool, repeat, rank: Some(p("adapter_rank")) })
        }
        other => panic!("{other}"),
    };
    (pooled(method, case, &case["params"], shape, device).into(), method.geometry(shape, p("r")))
}

/// Parts and their gradients, under their names.
fn parameters(adapter: &AnyAdapter) -> Vec<(&'static str, &Param<Tensor<2>>)> {
    match adapter {
        AnyAdapter::Lora(lora) => vec![("A", &lora.lora_a), ("B", &lora.lora_b)],
        AnyAdapter::Pooled(PooledAdapter { core: Core::LowRank(LowRank { a, b }), .. }) => {
            vec![("A", a), ("B", b)]
        }
        AnyAdapter::Pooled(PooledAdapter { core: Core::Full(Full { h }), .. }) => vec![("H", h)],
        other => panic!("{other:?}"),
    }
}

#[test]
fn forward_passes_and_gradients_are_those_of_the_specification() {
    let (vectors, device) = (open("forward"), Device::flex());
    let inputs = &vectors["inputs"];
    let base = linear(&inputs["W"], &device);
    let x = matrix(&inputs["x"], &device);
    let g = matrix(&inputs["G"], &device);
    let cases = vectors["cases"].as_object().unwrap();
    assert_eq!(cases.len(), 6);
    for (name, case) in cases {
        let expected = &case["expected"];
        let (adapter, geometry) = adapter(name, case, base.shape(), &device);
        let adapted = Adapted::new(base.clone(), Some(adapter));
        let what = |part: &str| format!("{name}: {part}");
        let y = adapted.forward(x.clone());
        assert_close(&what("y"), &read(y), &floats(&expected["y"]), TOLERANCE);
        let update = (adapted.weight() - base.weight()).transpose();
        assert_close(&what("delta_w"), &read(update), &floats(&expected["delta_w"]), TOLERANCE);
        assert_eq!(geometry.parameters(base.shape()), size(&expected["n_params"]), "{name}");
        assert_eq!(adapted.clone().train().adapter.unwrap().num_params(), size(&expected["n_params"]));
        assert!(geometry.rank_bound(base.shape()) >= size(&expected["rank_delta_w"]), "{name}");

        let model = adapted.train();
        let x = Tensor::from_inner(x.clone()).require_grad();
        let mut gradients = (model.forward(x.clone()) * g.clone()).sum().backward();
        let dx = read(x.grad_remove(&mut gradients).unwrap());
        assert_close(&what("dx"), &dx, &floats(&expected["grad_x"]), TOLERANCE);
        for (part, parameter) in parameters(model.adapter.as_ref().unwrap()) {
            let found = read(parameter.grad(&gradients).unwrap().transpose());
            assert_close(&what(part), &found, &floats(&expected["grad"][part]), 10.0 * TOLERANCE);
        }
    }
    // Twice LoRA's rank at LoRA's number of values.
    let qbara = &cases["qbara"]["expected"];
    assert_eq!(
        (size(&qbara["rank_delta_w"]), &qbara["n_params"]),
        (4, &cases["lora"]["expected"]["n_params"])
    );
}

/// An adapter whose map is the identity: what it adds is pooling or repeating alone.
fn bare(
    inputs: usize,
    sizes: [usize; 2],
    pooling: Pooling,
    device: &Device,
) -> Adapted<Linear, PooledAdapter> {
    let core = Core::full(Tensor::eye(inputs / sizes[0], device));
    let zero = Tensor::zeros([inputs, inputs / sizes[0] * sizes[1]], device);
    let base = Linear { weight: Param::from_tensor(zero), bias: None };
    Adapted::new(base, Some(PooledAdapter::new(core, sizes, pooling, 1.0, no_dropout())))
}

#[test]
fn pooling_and_repeating_and_their_gradients_are_exact() {
    let (vectors, device) = (open("pool_expand"), Device::flex());
    let (inputs, expected) = (&vectors["inputs"], &vectors["expected"]);
    let check = |model: Adapted<Linear, PooledAdapter>, x: &str, dy: Option<&str>, y: &str| {
        let x = Tensor::from_inner(matrix(&inputs[x], &device)).require_grad();
        let found = model.train().forward(x.clone());
        assert_eq!(read(found.clone()), floats(&expected[y]), "{y}");
        if let Some(dy) = dy {
            let mut gradients = (found * matrix(&inputs[dy], &device)).sum().backward();
            let found = read(x.grad_remove(&mut gradients).unwrap());
            assert_eq!(found, floats(&expected[format!("vjp_{y}")]), "{y}");
        }
    };
    let pool = |size, pooling| bare(8, [size, 1], pooling, &device);
    check(pool(2, Pooling::Average), "x", Some("grad_pooled"), "avg_pool_2");
    check(pool(2, Pooling::Sum), "x", Some("grad_pooled"), "sum_pool_2");
    check(pool(4, Pooling::Average), "x", None, "avg_pool_4");
    let repeat = |size| bare(4, [1, size], Pooling::Average, &device);
    check(repeat(2), "u", Some("grad_expanded"), "expand_2");
    check(repeat(3), "u", None, "expand_3");
}

#[test]
fn training_steps_are_those_of_the_specification() {
    let (vectors, device) = (open("train_steps"), Device::flex());
    let inputs = &vectors["inputs"];
    let (x, target) = (matrix(&inputs["X"], &device), matrix(&inputs["Y"], &device));
    for (name, case) in vectors["cases"].as_object().unwrap() {
        let base = linear(&inputs["W"], &device);
        let mut params = case.clone();
        params["scaling"] = inputs["scaling"].clone();
        let method = match name.as_str() {
            "qahira" => Method::QaHira(QaHira::for_tiles(size(&case["repeat_out"]), size(&case["pool_in"]))),
            _ => Method::QBara(QBara { lambda: size(&case["lambda_"]) }),
        };
        for part in ["A", "B", "H"] {
            params[part] = case[format!("{part}0")].clone();
        }
        if name == "qbara" {
            params["r"] = 2.into();
        }
        let adapter: AnyAdapter = pooled(method, &params, &params, base.shape(), &device).into();
        let mut model = Adapted::new(base, Some(adapter)).train();
        let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).with_epsilon(1e-8).init();
        let expected = floats(&case["losses"]);
        for (step, expected) in expected.iter().enumerate() {
            let difference = model.forward(x.clone()) - target.clone();
            let loss = (difference.clone() * difference).mean();
            assert_close(&format!("{name}: loss {step}"), &read(loss.clone()), &[*expected], 1e-5);
            let gradients = loss.backward();
            if step == 0 {
                for (part, parameter) in parameters(model.adapter.as_ref().unwrap()) {
                    let found = read(parameter.grad(&gradients).unwrap().transpose());
                    assert_close(part, &found, &floats(&case["first_grad"][part]), 1e-5);
                }
            }
            if step == 5 {
                break;
            }
            let gradients = GradientsParams::from_grads(gradients, &model);
            model = optimizer.step(0.05, model, gradients);
        }
        for (part, parameter) in parameters(model.adapter.as_ref().unwrap()) {
            let found = read(parameter.val().transpose());
            assert_close(&format!("{name}: {part}"), &found, &floats(&case["final"][part]), 1e-5);
        }
    }
}

/// The linears of one LLaMA block.
fn llama_block(hidden: usize, ffn: usize) -> Vec<[usize; 2]> {
    let (square, up) = ([hidden, hidden], [hidden, ffn]);
    vec![square, square, square, square, up, up, [ffn, hidden]]
}

#[test]
fn counts_and_rank_bounds_are_those_of_the_specification() {
    let vectors = open("counts");
    let models = vectors["expected"].as_object().unwrap();
    assert_eq!(models.len(), 4);
    for (name, model) in models {
        let (hidden, layers) = (size(&model["hidden"]), size(&model["layers"]));
        let block = llama_block(hidden, size(&model["ffn"]));
        let bounds = &model["rank_bounds_hxh"];
        let hira = |p, q| Method::QaHira(QaHira::for_tiles(q, p));
        for (key, bound, method) in [
            ("lora_r64", "lora", Method::lora()),
            ("qbara_lambda2_rank128", "qbara", Method::QBara(QBara { lambda: 2 })),
            ("qalora_g32_r64", "qalora_g32", Method::QaLora(QaLora::default())),
            ("qahira_pool4_repeat8", "qahira_4_8", hira(4, 8)),
            ("qahira_pool32_repeat1", "qahira_32_1", hira(32, 1)),
        ] {
            assert_eq!(layers * method.parameters(&block, 64), size(&model[key]), "{name} {key}");
            let found = method.geometry([hidden, hidden], 64).rank_bound([hidden, hidden]);
            assert_eq!(found, size(&bounds[bound]), "{name} {bound}");
        }
    }
}

#[test]
fn dropout_comes_after_the_pooling() {
    let (device, dropout) = (Device::flex(), Dropout::new(0.4, "up", 3));
    dropout.at(Place { step: 0, micro_batch: 0, training: true });
    let core = Core::low_rank(tensor(1, [6, 3], &device), tensor(2, [3, 5], &device));
    let adapter = PooledAdapter::new(core, [4, 2], Pooling::Average, 1.5, dropout.clone());
    let base = Linear { weight: Param::from_tensor(tensor(3, [24, 10], &device)), bias: None };
    let x = tensor::<2>(4, [7, 24], &device);
    let kept = kept(&dropout.drops().unwrap().mask(42), [7, 6], &device);
    let pooled = x.clone().reshape([7, 6, 4]).mean_dim(2).reshape([7, 6]) * kept / 0.6;
    let low = (pooled.matmul(adapter.core.matrix()) * 1.5).reshape([7, 5, 1]).expand([7, 5, 2]);
    let expected = Projection::forward(&base, x.clone()) + low.reshape([7, 10]);
    let found = Adapter::forward(&adapter, &base, x);
    assert!(relative_difference(&read(found), &read(expected)) < 1e-6);
}

#[test]
fn another_pooling_leaves_the_function() {
    let device = Device::flex();
    let core = || Core::low_rank(tensor(1, [6, 3], &device), tensor(2, [3, 10], &device));
    let base = Linear { weight: Param::from_tensor(tensor(3, [24, 10], &device)), bias: None };
    let x = tensor::<2>(4, [7, 24], &device);
    for from in [Pooling::Average, Pooling::Sum, Pooling::AverageTimesGroups] {
        let adapter = PooledAdapter::new(core(), [4, 1], from, 1.5, no_dropout());
        let expected = read(Adapter::forward(&adapter, &base, x.clone()));
        for to in [Pooling::Average, Pooling::Sum, Pooling::AverageTimesGroups] {
            let changed = adapter.clone().with_pooling(to);
            assert_eq!(changed.geometry().pooling, to);
            let found = read(Adapter::forward(&changed, &base, x.clone()));
            assert!(relative_difference(&found, &expected) < 1e-6, "{from:?} {to:?}");
        }
    }
}
