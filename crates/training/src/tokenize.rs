//! A model's own tokenizer and chat template, as the data pipeline takes them.

use std::{borrow::Cow, ops::Range};

use kiln_models::{
    Tokenizer,
    chat::{ChatTemplate, TemplateContext},
};

use crate::{Conversation, Message, TokenizeText};

/// A tokenizer with the chat template that belongs to it.
///
/// Texts are tokenised once; a token is learned if it stands for a character that is.
#[derive(Debug)]
pub struct ModelTokenizer<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    context: TemplateContext,
}

impl<'a> ModelTokenizer<'a> {
    /// `template` is needed for conversations only; `context` holds what it may ask for besides.
    pub fn new(
        tokenizer: &'a Tokenizer,
        template: Option<&'a ChatTemplate>,
        mut context: TemplateContext,
    ) -> Self {
        let special = tokenizer.special();
        let token = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
        context.bos_token = context.bos_token.or_else(|| token(special.bos));
        context.eos_token = context.eos_token.or_else(|| token(special.eos.first().copied()));
        Self { tokenizer, template, context }
    }

    /// The ids of `text`, and for each whether it stands for a character of `parts`, which ascend.
    fn learned(
        &self,
        text: &str,
        add_special: bool,
        parts: &[Range<usize>],
    ) -> Result<(Vec<u32>, Vec<bool>), String> {
        let tokens =
            self.tokenizer.encode_with_offsets(text, add_special).map_err(|error| error.to_string())?;
        let mut parts = parts.iter().peekable();
        let is_learned = |range: Range<usize>| {
            // Tokens ascend too.
            while parts.next_if(|part| part.end <= range.start && !range.is_empty()).is_some() {}
            parts.peek().is_some_and(|part| part.start < range.end && range.start < part.end)
        };
        let (ids, ranges): (Vec<u32>, Vec<Range<usize>>) = tokens.into_iter().unzip();
        Ok((ids, ranges.into_iter().map(is_learned).collect()))
    }

    fn template(&self) -> Result<&ChatTemplate, String> {
        self.template.ok_or_else(|| "the model has no chat template".into())
    }

    /// The ids of a conversation up to where the assistant's next turn begins.
    ///
    /// # Errors
    /// A model without a template, or a conversation that the template refuses, in words.
    pub fn prompt(&self, messages: &[Message]) -> Result<Vec<u32>, String> {
        let text =
            self.template()?.render(messages, true, &self.context).map_err(|error| error.to_string())?;
        // The template writes the special tokens itself.
        self.tokenizer.encode(&text, false).map_err(|error| error.to_string())
    }
}

impl TokenizeText for ModelTokenizer<'_> {
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, String> {
        self.tokenizer.encode(text, add_special).map_err(|error| error.to_string())
    }

    fn completion(
        &self,
        prompt: &str,
        completion: &str,
        add_special: bool,
    ) -> Result<(Vec<u32>, Vec<bool>), String> {
        let text = format!("{prompt}{completion}");
        self.learned(&text, add_special, std::slice::from_ref(&(prompt.len()..text.len())))
    }

    fn chat(&self, conversation: &Conversation) -> Result<(Vec<u32>, Vec<bool>), String> {
        let template = self.template()?;
        let Conversation { messages, variables, learned } = conversation;
        let mut context = Cow::Borrowed(&self.context);
        if !variables.is_empty() {
            context.to_mut().extra.extend(variables.clone());
        }
        let rendered =
            template.render_with_assistant_ranges(messages, &context).map_err(|error| error.to_string())?;
        let answers = messages.iter().zip(learned).filter(|(message, _)| message.role == "assistant");
        let flags: Vec<bool> = answers.map(|(_, learned)| *learned).collect();
        let mut parts = rendered.assistant;
        if flags.contains(&false) {
            if flags.len() != parts.len() {
                let (answers, parts) = (flags.len(), parts.len());
                return Err(format!(
                    "which of {answers} answers to learn can't be told: the template marks {parts} parts"
                ));
            }
            parts =
                parts.into_iter().zip(flags).filter(|(_, learned)| *learned).map(|(part, _)| part).collect();
        }
        // The template writes the special tokens itself.
        self.learned(&rendered.text, false, &parts)
    }

    fn has_chat(&self) -> bool {
        self.template.is_some()
    }
}
