//! Greedy texts that end where they are told to.

use std::ops::ControlFlow;

use kiln_models::CausalLm;

use super::{GenerateRequest, encode::Encoder};
use crate::{Result, error::Problem};

/// The text, and the tokens that it took.
pub(super) fn generate<M: CausalLm>(
    model: &M,
    encoder: &Encoder,
    max_length: usize,
    request: &GenerateRequest,
) -> Result<std::result::Result<(String, usize), Problem>> {
    let new = request.max_gen_toks;
    if new == 0 || new >= max_length {
        let expected = format!("at least 1, below {max_length}, the window");
        return Ok(Err(Problem::new("max_gen_toks", expected, new)));
    }
    let mut prompt = encoder.encode(&request.context)?;
    prompt.drain(..prompt.len().saturating_sub(max_length - new));
    if prompt.is_empty() {
        return Ok(Err(Problem::new("context", "at least one token", "none")));
    }
    let tokenizer = encoder.tokenizer();
    let end = tokenizer.special().eos.clone();
    let mut until = request.until.clone();
    for &id in &end {
        until.push(tokenizer.decode(&[id], false)?);
    }
    until.retain(|text| !text.is_empty());
    let options = kiln_models::GenerateOptions::new(new).with_stop(end);
    let (mut ids, mut failed) = (Vec::new(), None);
    let generation = kiln_models::generate_with(model, &prompt, &options, &mut |id| {
        ids.push(id);
        match tokenizer.decode(&ids, false) {
            Ok(text) if !until.iter().any(|end| text.contains(end)) => ControlFlow::Continue(()),
            Ok(_) => ControlFlow::Break(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    let text = tokenizer.decode(&generation.ids, true)?;
    Ok(Ok((cut(&text, &until).into(), prompt.len() + generation.ids.len())))
}

/// The text before the first of `until` that is in it.
fn cut<'a>(text: &'a str, until: &[String]) -> &'a str {
    until.iter().fold(text, |text, end| text.split_once(end.as_str()).map_or(text, |(before, _)| before))
}

#[cfg(test)]
mod tests {
    #[test]
    fn texts_end_before_what_ends_them() {
        let until = ["\n\n".to_owned(), ".".to_owned()];
        assert_eq!(super::cut("a b\n\nc. d", &until), "a b");
        assert_eq!(super::cut("a. b\n\nc", &until), "a");
        assert_eq!(super::cut("a b", &until), "a b");
        assert_eq!(super::cut(".", &until), "");
    }
}
