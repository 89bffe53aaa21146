//! The access token, kept out of every message.

use std::fmt;

use super::error::HubError;

/// An access token of the hub. `Debug` shows `Token(***)`, there is no `Display`, and the memory holds it only for the
/// `Authorization` header.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// A token from a variable or a file, without the white space around it; `None` where nothing is left.
    ///
    /// # Errors
    /// [`HubError::BadSetting`], which does not repeat the token, if it holds anything but visible ASCII (it would
    /// not fit in a header).
    pub fn new(text: &str) -> Result<Option<Self>, HubError> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(None);
        }
        if !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(HubError::BadSetting {
                name: "HF_TOKEN",
                reason: "the token holds a space or a character that is not ASCII; copy it again from the settings \
                         page of the hub"
                    .to_owned(),
            });
        }
        Ok(Some(Self(text.to_owned())))
    }

    /// The value of the `Authorization` header.
    pub(super) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// `text` with every occurrence of the token replaced, for text that a server wrote.
    pub(super) fn redact(&self, text: &str) -> String {
        text.replace(&self.0, "***")
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(***)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_hides_the_token() {
        let token = Token::new(" hf_secret\n").unwrap().unwrap();
        assert_eq!(format!("{token:?}"), "Token(***)");
        assert_eq!(token.header(), "Bearer hf_secret");
        assert_eq!(token.redact("you sent hf_secret!"), "you sent ***!");
    }

    #[test]
    fn tokens_that_are_none_or_wrong() {
        assert_eq!(Token::new(" \n").unwrap(), None);
        let error = Token::new("hf_se cret").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("cret"), "{error:?}");
        assert!(Token::new("hf\r\nX-Evil: 1").is_err());
    }
}
