//! Memory promises, as peak resident memory of a process of their own: each measurement runs this test binary again
//! with the name of the one test that does it.

use std::sync::Arc;

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use kiln::{
    Tuned,
    adapters::{AdapterConfig, LoraAttacher},
    calibration::{ApiqConfig, CalibrationConfig, Calibrator, Method},
    models::{CausalLm, Checkpoint, LoadOptions, Recompute, Slots, Windows},
    quant::{HostQuantizer, MinMax, PackedTensor, Plan, QuantScheme, Scheme},
    training::{BatchOptions, DataOptions, Dataset, Trainer, TrainerConfig},
};
use kiln_testkit::{peak, peak_of, report, resident, smollm2, task};

/// Growth of the peak over a training step of 8 packed layers of 2048² with 16 rows; `dense` multiplies by dequantized
/// weights instead, which the graph then keeps.
fn packed_step(scheme: &str, dense: bool) -> f64 {
    const SIZE: usize = 2048;
    let device = Device::flex();
    let scheme: QuantScheme = scheme.parse().unwrap();
    let host: Vec<f32> = (0..SIZE * SIZE).map(|i| ((i * 7919 % 1009) as f32 / 1009.0 - 0.5) * 0.05).collect();
    let layers: Vec<PackedTensor> = (0..8)
        .map(|_| PackedTensor::new(&MinMax.quantize("w", &host, SIZE, SIZE, &scheme).unwrap(), &device))
        .collect();
    drop(host);
    let step = |layers: &[PackedTensor]| {
        let x = Tensor::<2>::ones([16, SIZE], &device.clone().autodiff()).require_grad();
        let y = layers.iter().fold(x.clone(), |x, layer| match dense {
            true => x.matmul(layer.dequantize()),
            false => layer.forward(x),
        });
        let gradients = y.sum().backward();
        assert!(x.grad(&gradients).is_some());
    };
    // Buffers of the thread pool and of the matrix product are not the step's.
    step(&layers[..1]);
    // The peak so far is that of quantizing: fill up to it, so that growth is seen.
    let fill = vec![1u8; (peak() - resident()).max(0.0) as usize];
    let before = peak();
    step(&layers);
    let grown = peak() - before;
    assert_eq!(std::hint::black_box(&fill).iter().filter(|byte| **byte != 1).count(), 0);
    grown
}

#[test]
fn a_training_step_holds_no_dense_weights() {
    let test = "memory::a_training_step_holds_no_dense_weights";
    if let Some(scheme) = task() {
        let (scheme, dense) = scheme.split_once(' ').map_or((&*scheme, false), |(scheme, _)| (scheme, true));
        report(&[packed_step(scheme, dense)]);
        return;
    }
    let dense = (8 * 2048 * 2048 * 4) as f64;
    // The measurement must be able to fail.
    let control = peak_of(test, "affine4:64 dense");
    assert!(control > 0.7 * dense, "a step that keeps dense weights: {control} of {dense}");
    for scheme in ["affine2:64", "affine3:64", "affine4:64", "affine8:64", "nf4:64:double", "affine2:8x4"] {
        let grown = peak_of(test, scheme);
        println!("{scheme}: a step grows the peak by {:.1} MB of {:.0} MB dense", grown / 1e6, dense / 1e6);
        assert!(grown < dense / 4.0, "{scheme}: {grown} of {dense}");
    }
}

/// Peak of two training steps with per-block recomputation on the model in `folder`.
fn recomputed_steps(folder: &str, scheme: &str) -> f64 {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let options = LoadOptions::uniform(scheme.parse::<Scheme>().unwrap()).in_f32();
    let (model, _) = checkpoint.load(&options, &Device::flex()).unwrap();
    let config = AdapterConfig::lora(1, 1.0).with_targets(["q_proj"]);
    let model = Tuned::attach(model, &config).unwrap().into_model();
    let ids = (0..4096u32).map(|i| i * 31 % 512).collect();
    let dataset = Arc::new(Dataset::from_ids(ids, &DataOptions::new(LENGTH, 512)).unwrap());
    let mut config = TrainerConfig::new(2, BatchOptions::new(BATCH));
    config.recompute = Recompute::Block;
    let mut trainer = Trainer::new(model, dataset, config).unwrap();
    trainer.step().unwrap();
    trainer.step().unwrap();
    peak()
}

const BATCH: usize = 2;
const LENGTH: usize = 256;
const WIDTH: usize = 512;
const INNER: usize = 1024;

/// Experts of a block, and the channels of each.
const EXPERTS: usize = 8;
const EXPERT: usize = 256;

/// A checkpoint folder of bf16 weights without a meaning; its blocks have an MLP or experts.
fn write_model(blocks: usize, experts: bool) -> std::path::PathBuf {
    use safetensors::{Dtype, tensor::TensorView};
    let folder = std::env::temp_dir().join(format!("kiln-memory-{}-{blocks}-{experts}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (architecture, model_type, inner) = match experts {
        true => ("MixtralForCausalLM", "mixtral", EXPERT),
        false => ("LlamaForCausalLM", "llama", INNER),
    };
    let config = serde_json::json!({
        "architectures": [architecture], "model_type": model_type, "hidden_act": "silu", "vocab_size": 512,
        "hidden_size": WIDTH, "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": 8,
        "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false,
        "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![512, WIDTH])];
    for block in 0..blocks {
        let path = |name: &str| format!("model.layers.{block}.{name}.weight");
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            tensors.push((path(&format!("self_attn.{name}")), vec![WIDTH, WIDTH]));
        }
        let mut mlp = |names: [&str; 3]| {
            let shapes = [vec![inner, WIDTH], vec![inner, WIDTH], vec![WIDTH, inner]];
            tensors.extend(names.map(path).into_iter().zip(shapes));
        };
        if experts {
            for expert in 0..EXPERTS {
                let names =
                    ["w1", "w3", "w2"].map(|name| format!("block_sparse_moe.experts.{expert}.{name}"));
                mlp(names.each_ref().map(String::as_str));
            }
            tensors.push((path("block_sparse_moe.gate"), vec![EXPERTS, WIDTH]));
        } else {
            mlp(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]);
        }
        tensors.push((path("input_layernorm"), vec![WIDTH]));
        tensors.push((path("post_attention_layernorm"), vec![WIDTH]));
    }
    tensors.push(("model.norm.weight".to_string(), vec![WIDTH]));
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape)| {
            let count = shape.iter().product::<usize>();
            // bf16 bit patterns of small numbers.
            (0..count)
                .flat_map(|i| (0x3c00u16 | (i * 40503 % 512) as u16 | ((i % 2) as u16) << 15).to_le_bytes())
                .collect()
        })
        .collect();
    let views = tensors.iter().zip(&data).map(|((name, shape), data)| {
        (name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    folder
}

#[test]
fn recomputation_keeps_one_input_per_block() {
    let test = "memory::recomputation_keeps_one_input_per_block";
    if let Some(folder) = task() {
        report(&[recomputed_steps(&folder, "affine4:64")]);
        return;
    }
    let promised = 1.1 * (packed_block("affine4:64") + BATCH * LENGTH * WIDTH * 4) as f64;
    let slope = peak_by_block(test, "", 16, 64);
    println!("{:.2} MB per block, promised {:.2} MB", slope / 1e6, promised / 1e6);
    assert!(slope <= promised, "{slope} > {promised}");
}

#[test]
fn experts_stay_packed_while_a_model_is_trained() {
    let test = "memory::experts_stay_packed_while_a_model_is_trained";
    if let Some(task) = task() {
        let [_, scheme, folder] = task.splitn(3, ' ').collect::<Vec<_>>().try_into().unwrap();
        let scheme = if scheme == "dense" { "dense" } else { "affine4:64" };
        report(&[recomputed_steps(folder, scheme)]);
        return;
    }
    let scheme: QuantScheme = "affine4:64".parse().unwrap();
    let expert = 2 * scheme.storage_bytes(WIDTH, EXPERT) + scheme.storage_bytes(EXPERT, WIDTH);
    let block = 4 * scheme.storage_bytes(WIDTH, WIDTH) + EXPERTS * expert;
    // A hundred small tensors a block cost the allocator more than seven large ones.
    let promised = 1.25 * (block + BATCH * LENGTH * WIDTH * 4) as f64;
    let slope = peak_by_block(test, "experts packed ", 8, 40);
    println!("{:.2} MB per block, promised {:.2} MB", slope / 1e6, promised / 1e6);
    assert!(slope <= promised, "{slope} > {promised}");
    // The measurement must be able to fail.
    let control = peak_by_block(test, "experts dense ", 8, 24);
    assert!(control > 3.0 * promised, "experts of dense weights: {control}");
}

/// Bytes of the packed weights of one block.
fn packed_block(scheme: &str) -> usize {
    let scheme: QuantScheme = scheme.parse().unwrap();
    4 * scheme.storage_bytes(WIDTH, WIDTH)
        + 2 * scheme.storage_bytes(WIDTH, INNER)
        + scheme.storage_bytes(INNER, WIDTH)
}

/// By how much a block more raises the peak of `test`'s task, `kind` and a model folder.
fn peak_by_block(test: &str, kind: &str, few: usize, many: usize) -> f64 {
    let peak = |blocks: usize| {
        let folder = write_model(blocks, kind.starts_with("experts"));
        // Which of two threads frees what first, on a machine with other work, adds up to a twentieth; nothing takes away.
        let peaks = (0..2).map(|_| peak_of(test, &format!("{kind}{}", folder.display())));
        let peak = peaks.fold(f64::INFINITY, f64::min);
        std::fs::remove_dir_all(&folder).unwrap();
        peak
    };
    (peak(many) - peak(few)) / (many - few) as f64
}

/// Peak of ApiQ block by block, two windows and one epoch, on the model in `folder`: loaded at 2 bits, its weights read
/// again block by block, or loaded dense.
fn calibrated(folder: &str, dense: bool) -> f64 {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let scheme: Scheme = "affine2:64".parse().unwrap();
    let options = LoadOptions::uniform(if dense { Scheme::Dense } else { scheme }).in_f32();
    let (model, _) = checkpoint.load(&options, &Device::flex()).unwrap();
    let attacher = LoraAttacher::new(&AdapterConfig::lora(4, 4.0), &model.slot_shapes()).unwrap();
    let window = |k: u32| (0..LENGTH as u32).map(|i| (i * 31 + k * 7) % 512).collect();
    let windows = Windows::new((0..BATCH as u32).map(window).collect()).unwrap();
    let method = Method::ApiqBlock(ApiqConfig { epochs: 1, ..ApiqConfig::default() });
    let config = CalibrationConfig::new(method, Plan::uniform(scheme));
    let mut calibrator = Calibrator::new(&config, &windows).with_adapters(&attacher);
    if !dense {
        calibrator = calibrator.with_weights(checkpoint.source());
    }
    let (model, _) = calibrator.run(model).unwrap();
    drop(model);
    peak()
}

#[test]
fn a_calibration_holds_the_dense_weights_of_one_block() {
    let test = "memory::a_calibration_holds_the_dense_weights_of_one_block";
    if let Some(task) = task() {
        let (kind, folder) = task.split_once(' ').unwrap();
        report(&[calibrated(folder, kind == "dense")]);
        return;
    }
    // A and B of rank 4 beside the packed weights, but no activations: half a stream is left for scatter.
    let factors = 4 * 4 * (4 * (WIDTH + WIDTH) + 3 * (WIDTH + INNER));
    let promised = (packed_block("affine2:64") + factors + BATCH * LENGTH * WIDTH * 4 / 2) as f64;
    let slope = peak_by_block(test, "packed ", 4, 44);
    println!("{:.2} MB per block, promised {:.2} MB", slope / 1e6, promised / 1e6);
    assert!(slope <= promised, "{slope} > {promised}");
    // The measurement must be able to fail.
    let control = peak_by_block(test, "dense ", 4, 24);
    assert!(control > 4.0 * promised, "a model of dense weights: {control}");
}

#[test]
fn loading_smollm2_holds_one_dense_tensor() {
    let test = "memory::loading_smollm2_holds_one_dense_tensor";
    let Some(file) = smollm2() else { return };
    let load = || {
        let options = LoadOptions::uniform("affine4:64".parse().unwrap()).in_f32();
        Checkpoint::open(&file).unwrap().load(&options, &Device::flex()).unwrap()
    };
    if task().is_some() {
        let loaded = load();
        report(&[peak()]);
        drop(loaded);
        return;
    }
    let (model, report) = load();
    assert_eq!(model.valid().num_blocks(), 30);
    let (found, total) = (peak_of(test, "load"), report.storage.total_bytes() as f64);
    println!("loading peaks at {:.1} MB; the model is {:.1} MB", found / 1e6, total / 1e6);
    assert!(found < total + 120e6, "{found} {total}");
}
