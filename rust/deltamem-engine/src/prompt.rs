//! From what a caller says to tokens and their spans: the one place where a bundle's write granularity meets its text. It knows the
//! tokenizer and the template; it knows nothing of sessions.

use std::borrow::Cow;

use crate::bundle::WriteGranularity;
use crate::error::{EngineError, Result};
use crate::model::Model;
use crate::spans::Spans;
use crate::text::{Cut, Message, cut_chat, cut_text};

impl Model {
    /// Text to token ids and what they write. `add_special` adds the tokens that the tokenizer puts around a text of its own.
    ///
    /// # Errors
    /// [`EngineError::Value`] when span ids are given for a text; [`EngineError::Session`] without a tokenizer; [`EngineError::Text`].
    pub fn encode_text(
        &self,
        text: &str,
        add_special: bool,
        spans: Spans<'static>,
        write: bool,
    ) -> Result<(Vec<i32>, Spans<'static>)> {
        let tokenizer = self.text()?;
        match self.cuts(&spans, write)? {
            Some(granularity) => Ok(cut(cut_text(tokenizer, text, add_special, granularity)?)),
            None => Ok((tokenizer.encode(text, add_special)?, spans)),
        }
    }

    /// A conversation to the token ids of the bundle's chat template, with the prompt for a reply, and what they write.
    ///
    /// # Errors
    /// As [`Model::encode_text`], and [`EngineError::Session`] without a chat template.
    pub fn encode_chat(
        &self,
        messages: &[Message],
        spans: Spans<'static>,
        write: bool,
    ) -> Result<(Vec<i32>, Spans<'static>)> {
        let (template, tokenizer) = (self.template()?, self.text()?);
        match self.cuts(&spans, write)? {
            Some(granularity) => Ok(cut(cut_chat(tokenizer, template, messages, granularity)?)),
            None => Ok((tokenizer.encode(&template.render(messages, true)?, false)?, spans)),
        }
    }

    /// The token ids of a system message by itself, as it stands at the beginning of a conversation in the bundle's chat template.
    ///
    /// # Errors
    /// [`EngineError::Session`] without a tokenizer or a template; [`EngineError::Text`]; [`EngineError::Value`] when the template does not put the
    /// message in front of the others as it renders it alone.
    pub fn encode_system(&self, content: &str) -> Result<Vec<i32>> {
        let (template, tokenizer) = (self.template()?, self.text()?);
        let message = |role: &str, content: &str| Message {
            role: role.into(),
            content: content.into(),
        };
        let system = message("system", content);
        let alone = tokenizer.encode(&template.render(std::slice::from_ref(&system), false)?, false)?;
        for probe in ["Hello", "1"] {
            let both = [system.clone(), message("user", probe)];
            let whole = tokenizer.encode(&template.render(&both, true)?, false)?;
            if alone.is_empty() || !whole.starts_with(&alone) {
                return Err(EngineError::Value(
                    "the bundle's chat template does not put a system message in front of a conversation as it renders it alone, so it cannot be \
                     read by itself; pass system= as text, or token ids of your own to prefix()"
                        .into(),
                ));
            }
        }
        Ok(alone)
    }

    /// Into what a text is cut: nothing in a token bundle, when it writes by token on purpose, and when it does not write.
    fn cuts(&self, spans: &Spans<'_>, write: bool) -> Result<Option<WriteGranularity>> {
        let granularity = self.manifest().memory.write_granularity;
        match spans {
            Spans::Ids(_) => Err(EngineError::Value(
                "spans holds ids, and text is given, whose tokens are not known before it is encoded: leave spans out (the bundle's own \
                 granularity cuts the text), pass spans=\"token\", or encode the text with model.encode() and pass its ids"
                    .into(),
            )),
            Spans::Unsaid if write && granularity != WriteGranularity::Token => Ok(Some(granularity)),
            Spans::Unsaid | Spans::Token => Ok(None),
        }
    }
}

fn cut(cut: Cut) -> (Vec<i32>, Spans<'static>) {
    (cut.ids, Spans::Ids(Cow::Owned(cut.spans)))
}
