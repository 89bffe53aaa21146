//! Text from tokens as they come.

/// Turns a stream of tokens into text that is never taken back and never cut inside a character.
///
/// The text of a token depends on its neighbours (a leading space, the bytes of one character in several tokens), so
/// each step decodes the tokens of the last piece and the new ones together, and gives what the new ones add; it waits
/// while that ends in an unfinished character. This is the method of the `tokenizers` library's `DecodeStream`.
pub(super) struct TextStream {
    /// Tokens already shown that give the next ones their context, then tokens not shown yet.
    ids: Vec<u32>,
    context: usize,
    /// The text of the context.
    prefix: String,
}

/// Tokens of the prompt that are context for the first new one.
const TAIL: usize = 8;

/// The character that stands for bytes that are no text.
const BROKEN: char = '\u{fffd}';

type Decode<'a, E> = &'a dyn Fn(&[u32]) -> Result<String, E>;

impl TextStream {
    /// A stream after `prompt`.
    pub(super) fn new<E>(prompt: &[u32], decode: Decode<E>) -> Result<Self, E> {
        let ids = prompt[prompt.len().saturating_sub(TAIL)..].to_vec();
        Ok(Self { prefix: decode(&ids)?, context: ids.len(), ids })
    }

    /// The text that `token` completes; empty while a character is unfinished.
    pub(super) fn push<E>(&mut self, token: u32, decode: Decode<E>) -> Result<String, E> {
        self.ids.push(token);
        let text = decode(&self.ids)?;
        if text.ends_with(BROKEN) {
            return Ok(String::new());
        }
        let new = self.added(&text).to_owned();
        if !new.is_empty() {
            self.ids.drain(..self.context);
            self.context = self.ids.len();
            self.prefix = decode(&self.ids)?;
        }
        Ok(new)
    }

    /// What is left, once no token follows.
    pub(super) fn finish<E>(&self, decode: Decode<E>) -> Result<String, E> {
        Ok(self.added(&decode(&self.ids)?).to_owned())
    }

    /// `text` without the context's; a decoder that changes the context's text keeps what both begin with.
    fn added<'t>(&self, text: &'t str) -> &'t str {
        let same = text.chars().zip(self.prefix.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        &text[same..]
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// Tokens are bytes.
    fn bytes(ids: &[u32]) -> Result<String, Infallible> {
        let bytes: Vec<u8> = ids.iter().map(|id| *id as u8).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Tokens are words; the decoder drops a space at the start, as SentencePiece's does.
    fn words(ids: &[u32]) -> Result<String, Infallible> {
        let text: String = ids.iter().map(|id| [" the", " old", " man", "'s", ""][*id as usize]).collect();
        Ok(text.strip_prefix(' ').unwrap_or(&text).to_owned())
    }

    fn pieces(prompt: &[u32], ids: &[u32], decode: Decode<Infallible>) -> (Vec<String>, String) {
        let Ok(mut stream) = TextStream::new(prompt, decode);
        let pieces = ids.iter().map(|id| stream.push(*id, decode).unwrap()).collect();
        (pieces, stream.finish(decode).unwrap())
    }

    #[test]
    fn characters_come_whole() {
        let text = "aé漢🙂, ok";
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        let (pieces, rest) = pieces(&[u32::from(b'x')], &ids, &bytes);
        assert_eq!((pieces.concat(), rest.as_str()), (text.to_owned(), ""));
        assert!(pieces.iter().all(|piece| !piece.contains(BROKEN) && piece.chars().count() <= 1));
    }

    #[test]
    fn an_unfinished_character_is_shown_at_the_end_only() {
        let (shown, rest) = pieces(&[], &[104, 0xf0, 0x9f], &bytes);
        assert_eq!((shown.concat(), rest), ("h".to_owned(), BROKEN.to_string()));
        // Bytes that never become a character do not hold back the text after them.
        let (shown, rest) = pieces(&[], &[0xf0, 104, 105], &bytes);
        assert_eq!((shown.concat(), rest), (format!("{BROKEN}hi"), String::new()));
    }

    #[test]
    fn spaces_between_tokens_stay() {
        let (shown, rest) = pieces(&[0], &[1, 2, 4, 3, 0], &words);
        assert_eq!(
            (shown, rest),
            (vec![" old".into(), " man".into(), String::new(), "'s".into(), " the".into()], String::new())
        );
        // Without a prompt there is nothing to be apart from.
        assert_eq!(pieces(&[], &[1, 2], &words).0, ["old", " man"]);
    }
}
