//! AutoMixQ: searches how many bits each layer's attention and MLP get, and loads the best plan of a memory limit.
//!
//! Without arguments: the embedded model, 120 evaluations of KL on 1024 tokens, and the bytes of uniform 3 bits as the
//! limit, in about a minute.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{error::Error, path::PathBuf, process::ExitCode};

use clap::Parser;
use kiln::{
    mixq::{Choices, KlOptions, ModelObjective, Variants, load_options, space_of},
    mixq_search::{Fidelity, Granularity, Objective, SearchSettings, TrialLog, method, search},
    models::{Decoder, LoadOptions, Windows, export::save_model},
    quant::{QuantLinear, Scheme, files::OutputFolder},
};
use kiln_examples::{
    ModelArgs, Result, check_outputs, model_folder, perplexity, save_replacing, say, split_ids, write_json,
};

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(flatten)]
    model: ModelArgs,
    /// Formats to choose from, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "affine2:64,affine3:64,affine4:64")]
    schemes: Vec<Scheme>,
    /// The uniform plan whose bytes are the limit.
    #[arg(long, default_value = "affine3:64")]
    within: Scheme,
    /// How to search: klmix, paper, released, nsga2, bo, amq, random or uniform.
    #[arg(long, default_value = "klmix")]
    method: String,
    /// Plans that may be measured.
    #[arg(long, default_value_t = 120)]
    evaluations: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Tokens of a window; eight of them are measured.
    #[arg(long, default_value_t = 128)]
    length: usize,
    /// Text to search and evaluate on, .txt or .u16le; held-out text of the embedded model if left out.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Gets the front (front.json, front.md, front.svg), the model of the plan that was chosen (model/) and every measured plan
    /// (search.jsonl), behind which a search that was killed goes on.
    #[arg(long, default_value = "target/kiln-automixq")]
    out: PathBuf,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn run(options: Options) -> Result<()> {
    let out = OutputFolder::claim(&options.out)?;
    check_outputs([&Some(options.out.join("front.json")), &options.json])?;
    let folder = model_folder(out.path(), options.model.model.as_deref())?;
    let checkpoint = options.model.checkpoint()?;
    let (model, _) = options.model.load(&checkpoint)?;
    let (train, held_out) = split_ids(options.data.as_deref(), &checkpoint.tokenizer()?)?;
    let windows = Windows::leading(&train, options.length, 8)?;

    let choices = Choices::new(options.schemes.iter().copied()).with_granularity(Granularity::Block);
    let space = space_of(&model, &choices)?;
    let limit = space_of(&model, &Choices::new([options.within]))?.smallest();
    let plans = space.size().map_or("more than 2^128".into(), |size| size.to_string());
    say!("{plans} plans of {} to {} bytes; at most {limit} wanted", space.smallest(), space.largest());

    let mut objective = ModelObjective::new(Variants::new(model), &windows, &KlOptions::default())?;
    let mut log = TrialLog::open(options.out.join("search.jsonl"), &space, &objective.fingerprint())?;
    if log.skipped() > 0 {
        eprintln!("note: {} lines of search.jsonl are no trials of this space", log.skipped());
    }
    let settings =
        SearchSettings::new(options.evaluations, Fidelity::kl(objective.tokens())).with_seed(options.seed);
    let found = search(&space, &mut objective, &mut log, &*method(&options.method)?, &settings)?;
    found.front.save(&options.out, &found.trials)?;
    say!("{}", found.front.to_markdown());

    let best = found.front.select(limit)?;
    let loaded = |load: &LoadOptions<'_>| -> Result<Decoder<QuantLinear>> {
        Ok(checkpoint.load(load, &options.model.device.open()?)?.0)
    };
    let perplexity_of = |model: &Decoder<QuantLinear>| {
        Ok::<_, Box<dyn Error>>(perplexity(model, &held_out, options.length)?.perplexity)
    };
    let uniform = perplexity_of(&loaded(&LoadOptions::uniform(options.within))?)?;
    let chosen = loaded(&load_options(&best.plan)?)?;
    let mixed = perplexity_of(&chosen)?;
    save_replacing(&folder, |folder| save_model(&chosen, &checkpoint, folder))?;
    say!("perplexity within {limit} bytes: {uniform:.2} uniform, {mixed:.2} mixed ({} bytes)", best.bytes);
    say!("front and model written to {}", options.out.display());
    write_json(
        options.json.as_deref(),
        &serde_json::json!({
            "evaluations": found.evaluations,
            "limit": limit,
            "bytes": best.bytes,
            "plan": best.plan,
            "perplexity_uniform": uniform,
            "perplexity_mixed": mixed,
        }),
    )
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
