//! Text to tokens and back: the bundle's tokenizer, and pieces of text that are whole characters. It knows files and ids; it knows
//! nothing of sessions or of what a model makes of the ids. Stop texts are in `stop`, chat templates in `template`, messages and sentences in
//! `spans`.

mod date;
mod spans;
mod stop;
mod template;

use std::path::Path;
use std::sync::Arc;

use tokenizers::Tokenizer;

pub use spans::{Cut, cut_chat, cut_text, sentences};
pub use stop::{StopScan, StopScanner};
pub use template::{ChatTemplate, Message};

use crate::bundle::Manifest;

/// What can go wrong between text and tokens.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A file of the bundle could not be read.
    #[error("{file}: {message}; copy or export the bundle again")]
    File {
        /// The file's name in the bundle.
        file: String,
        /// The system's or the library's own words.
        message: String,
    },
    /// The tokenizer failed on a text or on ids.
    #[error("the tokenizer failed while {doing}: {message}")]
    Tokenizer {
        /// What was being done.
        doing: &'static str,
        /// The library's own words.
        message: String,
    },
    /// The chat template is wrong, or refused the messages.
    #[error("the chat template{}: {message}", line.map(|line| format!(", line {line}")).unwrap_or_default())]
    Template {
        /// The template's line, from 1.
        line: Option<usize>,
        /// What happened there.
        message: String,
    },
    /// It cannot be told which tokens belong to which message.
    #[error(
        "which tokens belong to which message cannot be told: {0}; pass spans=\"token\" to write each token by itself, or build the turn \
         with feed() and generate() and spans of your own"
    )]
    Spans(String),
}

/// A bundle's tokenizer.
#[derive(Clone)]
pub struct Text {
    tokenizer: Arc<Tokenizer>,
}

impl std::fmt::Debug for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Text")
            .field("vocab", &self.vocab())
            .finish_non_exhaustive()
    }
}

impl Text {
    /// The tokenizer of the bundle in `dir`; `None` when the manifest has none.
    ///
    /// # Errors
    /// [`TextError::File`] when the file cannot be read or is no tokenizer.
    pub fn load(dir: &Path, manifest: &Manifest) -> Result<Option<Self>, TextError> {
        let Some(files) = &manifest.text else {
            return Ok(None);
        };
        let file = |message: String| TextError::File {
            file: files.tokenizer.clone(),
            message,
        };
        let bytes = std::fs::read(dir.join(&files.tokenizer)).map_err(|error| file(error.to_string()))?;
        Self::from_bytes(&bytes)
            .map(Some)
            .map_err(|error| file(error.to_string()))
    }

    /// The tokenizer that the bytes of a `tokenizer.json` describe.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] when they describe none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TextError> {
        let failed = TextError::tokenizer("reading its file");
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(&failed)?;
        // Settings for training batches that some files carry: here they would silently cut or lengthen texts.
        tokenizer.with_truncation(None).map_err(&failed)?;
        tokenizer.with_padding(None);
        Ok(Self {
            tokenizer: Arc::new(tokenizer),
        })
    }

    /// Text to token ids. Special tokens that stand in the text are recognised as the tokenizer defines them; `add_special` also puts
    /// the ones around it that the tokenizer puts around a text of its own (such as BOS).
    ///
    /// # Errors
    /// [`TextError::Tokenizer`].
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<i32>, TextError> {
        let failed = TextError::tokenizer("encoding");
        let encoding = self.tokenizer.encode_fast(text, add_special).map_err(&failed)?;
        encoding
            .get_ids()
            .iter()
            .map(|&id| i32::try_from(id).map_err(|error| failed(error.into())))
            .collect()
    }

    /// The same ids, and for each the byte of the text where it starts; `None` for a token that `add_special` put around the text. A
    /// token that holds a part of a character starts where the character does.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`].
    pub fn encode_with_starts(
        &self,
        text: &str,
        add_special: bool,
    ) -> Result<(Vec<i32>, Vec<Option<usize>>), TextError> {
        let failed = TextError::tokenizer("encoding");
        let encoding = self.tokenizer.encode(text, add_special).map_err(&failed)?;
        let ids = encoding
            .get_ids()
            .iter()
            .map(|&id| i32::try_from(id).map_err(|error| failed(error.into())))
            .collect::<Result<_, _>>()?;
        let starts = encoding
            .get_offsets()
            .iter()
            .zip(encoding.get_special_tokens_mask())
            .map(|(&(start, _), &added)| (added == 0).then_some(start))
            .collect();
        Ok((ids, starts))
    }

    /// Token ids to text. Ids that the tokenizer does not know (a vocabulary may be padded) give no text; `skip_special` leaves special
    /// tokens out. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`].
    pub fn decode(&self, ids: &[i32], skip_special: bool) -> Result<String, TextError> {
        let ids: Vec<u32> = ids.iter().filter_map(|&id| u32::try_from(id).ok()).collect();
        self.tokenizer
            .decode(&ids, skip_special)
            .map_err(TextError::tokenizer("decoding"))
    }

    /// The id of a token, by its exact content.
    pub fn token_to_id(&self, token: &str) -> Option<i32> {
        i32::try_from(self.tokenizer.token_to_id(token)?).ok()
    }

    /// Tokens that the tokenizer knows, added ones included.
    pub fn vocab(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// A stream that turns ids into pieces of text, special tokens left out.
    pub fn stream(&self) -> TextStream {
        TextStream {
            text: self.clone(),
            context: Vec::new(),
            pending: Vec::new(),
        }
    }

    /// Whether an id gives no text, wherever it stands.
    fn is_silent(&self, id: u32) -> bool {
        match self.tokenizer.id_to_token(id) {
            Some(token) => self.tokenizer.get_added_vocabulary().is_special_token(&token),
            None => true,
        }
    }

    fn decode_u32(&self, ids: &[u32]) -> Result<String, TextError> {
        self.tokenizer
            .decode(ids, true)
            .map_err(TextError::tokenizer("decoding"))
    }
}

impl TextError {
    fn tokenizer(doing: &'static str) -> impl Fn(tokenizers::Error) -> Self {
        move |error| Self::Tokenizer {
            doing,
            message: error.to_string(),
        }
    }
}

/// No character has more bytes, so no whole character waits for more tokens.
const LONGEST_CHARACTER: usize = 4;
/// Tokens that may pile up without any text, such as spaces that a decoder strips at the beginning.
const MOST_WITHOUT_TEXT: usize = 32;

/// Token ids in, pieces of text out. A piece is whole characters: one that is split over tokens waits for its last token. Put together,
/// the pieces are the decoded text of all the ids; only a byte-fallback tokenizer whose bytes are no UTF-8 may spell the broken
/// characters otherwise.
#[derive(Debug, Clone)]
pub struct TextStream {
    text: Text,
    /// The ids of the last piece: their text is out, but decoders look at neighbours, so it is decoded along and cut off again.
    context: Vec<u32>,
    /// Ids whose text is not out yet.
    pending: Vec<u32>,
}

impl TextStream {
    /// Takes one id; returns the text that is certain by now, if there is any.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`].
    pub fn push(&mut self, id: i32) -> Result<Option<String>, TextError> {
        let Ok(id) = u32::try_from(id) else {
            return Ok(None);
        };
        if self.text.is_silent(id) {
            return Ok(None);
        }
        self.pending.push(id);
        let before = self.text.decode_u32(&self.context)?;
        let all = self.decode_with(self.pending.len())?;
        match all.strip_prefix(&before) {
            // Not advanced: a decoder may strip at the beginning what it would keep later on.
            Some("") if self.pending.len() < MOST_WITHOUT_TEXT => return Ok(None),
            Some(piece) if !piece.ends_with(char::REPLACEMENT_CHARACTER) => {
                let piece = piece.to_owned();
                self.advance(self.pending.len());
                return Ok(Some(piece).filter(|piece| !piece.is_empty()));
            }
            _ => {}
        }
        if self.pending.len() <= LONGEST_CHARACTER {
            return Ok(None);
        }
        self.force(&before, &all)
    }

    /// The text that is still held back. The stream is empty afterwards.
    pub fn finish(&mut self) -> String {
        let before = self.text.decode_u32(&self.context).unwrap_or_default();
        let all = self.decode_with(self.pending.len()).unwrap_or_default();
        let rest = match all.strip_prefix(&before) {
            Some(rest) => rest.to_owned(),
            None => self.text.decode_u32(&self.pending).unwrap_or_default(),
        };
        self.context.clear();
        self.pending.clear();
        rest
    }

    /// More tokens wait than a character has bytes, so U+FFFD is really meant. Gives out all but what a later token may still change:
    /// the longest beginning whose text the whole text goes on from.
    fn force(&mut self, before: &str, all: &str) -> Result<Option<String>, TextError> {
        if !all.starts_with(before) {
            // The new bytes spoil the context's own (byte fallback): begin anew without it.
            self.context.clear();
            let all = self.decode_with(self.pending.len())?;
            return self.force_from("", &all);
        }
        self.force_from(before, all)
    }

    fn force_from(&mut self, before: &str, all: &str) -> Result<Option<String>, TextError> {
        for count in (1..self.pending.len()).rev() {
            let part = self.decode_with(count)?;
            if part.len() < all.len()
                && all.starts_with(&part)
                && let Some(piece) = part.strip_prefix(before)
            {
                let piece = piece.to_owned();
                self.advance(count);
                return Ok(Some(piece).filter(|piece| !piece.is_empty()));
            }
        }
        Ok(None)
    }

    fn decode_with(&self, count: usize) -> Result<String, TextError> {
        let ids: Vec<u32> = self
            .context
            .iter()
            .chain(&self.pending[..count])
            .copied()
            .collect();
        self.text.decode_u32(&ids)
    }

    /// The text of the first `count` pending ids is out.
    fn advance(&mut self, count: usize) {
        let rest = self.pending.split_off(count);
        self.context = std::mem::replace(&mut self.pending, rest);
    }
}

#[cfg(test)]
mod tests;
