//! A model's own tokenizer and chat template, as the data pipeline takes them.

use kiln_models::{
    Tokenizer,
    chat::{self, ChatTemplate, TemplateContext},
};

use crate::{Message, TokenizeText};

/// A tokenizer with the chat template that belongs to it.
///
/// Conversations are rendered once and tokenised once; a token is the assistant's if it begins inside a range of text
/// that an assistant turn produced.
#[derive(Debug)]
pub struct ModelTokenizer<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<ChatTemplate>,
    context: TemplateContext,
}

impl<'a> ModelTokenizer<'a> {
    /// `template` is needed for conversations only; `context` holds what it may ask for besides.
    pub fn new(
        tokenizer: &'a Tokenizer,
        template: Option<ChatTemplate>,
        mut context: TemplateContext,
    ) -> Self {
        let special = tokenizer.special();
        let token = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
        context.bos_token = context.bos_token.or_else(|| token(special.bos));
        context.eos_token = context.eos_token.or_else(|| token(special.eos.first().copied()));
        Self { tokenizer, template, context }
    }
}

impl TokenizeText for ModelTokenizer<'_> {
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, String> {
        self.tokenizer.encode(text, add_special).map_err(|error| error.to_string())
    }

    fn chat(&self, messages: &[Message]) -> Result<(Vec<u32>, Vec<bool>), String> {
        let template = self.template.as_ref().ok_or("the model has no chat template")?;
        let messages: Vec<chat::Message> =
            messages.iter().map(|m| chat::Message::new(m.role.as_str(), m.content.as_str())).collect();
        let rendered = template
            .render_with_assistant_ranges(&messages, &self.context)
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
