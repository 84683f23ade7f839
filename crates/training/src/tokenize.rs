//! A model's own tokenizer and chat template, as the data pipeline takes them.

use kiln_models::{
    Tokenizer,
    chat::{ChatTemplate, TemplateContext},
};

use crate::{Message, TokenizeText};

/// A tokenizer with the chat template that belongs to it.
///
/// Conversations are rendered once and tokenised once; a token is the assistant's if it begins inside a range of text
/// that an assistant turn produced.
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

    fn chat(&self, messages: &[Message]) -> Result<(Vec<u32>, Vec<bool>), String> {
        let template = self.template()?;
        let rendered = template
            .render_with_assistant_ranges(messages, &self.context)
            .map_err(|error| error.to_string())?;
        // The template writes the special tokens itself.
        let tokens =
            self.tokenizer.encode_with_offsets(&rendered.text, false).map_err(|error| error.to_string())?;
        Ok(tokens
            .into_iter()
            .map(|(id, range)| (id, rendered.assistant.iter().any(|turn| turn.contains(&range.start))))
            .unzip())
    }
}
