//! Continues a prompt, token by token.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{io::Write, ops::ControlFlow, path::PathBuf, process::ExitCode, time::Instant};

use clap::Parser;
use kiln::{
    models::{GenerateOptions, chat::Message, generate_with},
    training::ModelTokenizer,
};
use kiln_examples::{ModelArgs, Result, check_outputs, say, template_context, write_json};

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(flatten)]
    model: ModelArgs,
    #[arg(long, default_value = "The President shall have power to")]
    prompt: String,
    /// Puts the prompt into the model's chat template, as a user's turn.
    #[arg(long)]
    chat: bool,
    #[arg(long, default_value_t = 40)]
    max_new_tokens: usize,
    /// 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    #[arg(long)]
    top_k: Option<usize>,
    #[arg(long)]
    top_p: Option<f64>,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn run(options: Options) -> Result<()> {
    check_outputs([&options.json])?;
    let checkpoint = options.model.checkpoint()?;
    let tokenizer = checkpoint.tokenizer()?;
    let prompt = if options.chat {
        let template = checkpoint.chat_template()?;
        let text = ModelTokenizer::new(&tokenizer, template.as_ref(), template_context());
        text.prompt(&[Message::new("user", options.prompt.as_str())])?
    } else {
        tokenizer.encode(&options.prompt, true)?
    };
    let (model, _) = options.model.load_adapted(&checkpoint)?;
    let mut generation = GenerateOptions::new(options.max_new_tokens)
        .with_temperature(options.temperature)
        .with_seed(options.seed)
        .with_stop(tokenizer.special().eos.clone());
    (generation.top_k, generation.top_p) = (options.top_k, options.top_p);

    let mut out = std::io::stdout();
    // A closed terminal is no reason to go on.
    let mut show = |text: &str| match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    };
    let _ = show(if options.chat { "" } else { &options.prompt });
    let mut stream = tokenizer.decode_stream(true);
    let start = Instant::now();
    let result =
        generate_with(&model, &prompt, &generation, &mut |id| show(&stream.push(id).unwrap_or_default()))?;
    let rate = result.ids.len() as f64 / start.elapsed().as_secs_f64();
    say!("{}", stream.finish().unwrap_or_default());
    eprintln!("{} tokens, {rate:.1} tokens/s, {:?}", result.ids.len(), result.finish);
    write_json(
        options.json.as_deref(),
        &serde_json::json!({
            "token_ids": result.ids,
            "text": tokenizer.decode(&result.ids, true)?,
            "tokens_per_second": rate,
        }),
    )
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
