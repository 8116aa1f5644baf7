//! The token that requests over TCP must carry: `Authorization: Bearer TOKEN`. (RFC 6750, 2.1)

use std::fmt;
use std::path::Path;

use axum::extract::Request;
use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header;
use axum::middleware::Next;
use axum::response::IntoResponse;
use axum::response::Response;
use subtle::ConstantTimeEq;
use tokio::sync::watch;

use super::problem::Refusal;
use super::serve;
use super::serve::Guard;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::secret;

/// Shortest token. 32 characters are 128 bits even in hexadecimal, which nobody guesses.
pub const TOKEN_BYTES_MIN: usize = 32;
/// Longest token file read.
const FILE_BYTES_MAX: u64 = 4096;
/// A secret shared with those who manage the node.
pub struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    /// Reads the token from a file that holds it alone, with or without a newline.
    ///
    /// # Errors
    /// `InvalidRequest` if the file cannot be read, others can get at it, or the token is weak.
    pub fn read(path: &Path) -> Result<Self> {
        const OP: &str = "read the API's token file";
        let text = secret::file::read(OP, path, FILE_BYTES_MAX)?;
        let token = text.trim();
        if token.len() < TOKEN_BYTES_MIN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Error::new(ErrorKind::InvalidRequest, OP).context(format!(
                "{} must hold at least {TOKEN_BYTES_MIN} letters, digits or signs: make one with \
                 `openssl rand -hex 32`",
                path.display()
            )));
        }
        Ok(Self(token.to_owned()))
    }

    /// Whether this is what a request must have. Takes as long for a wrong token as for the right
    /// one, so that it cannot be found letter by letter.
    fn allows(&self, authorization: Option<&HeaderValue>) -> bool {
        let given = authorization.and_then(|value| value.as_bytes().split_at_checked(7));
        given.is_some_and(|(scheme, token)| {
            scheme.eq_ignore_ascii_case(b"bearer ") && token.ct_eq(self.0.as_bytes()).into()
        })
    }
}

/// Lets through what carries the token, and refuses all else before its body is read.
pub(super) async fn required(
    State(guard): State<watch::Receiver<Guard>>,
    request: Request,
    next: Next,
) -> Response {
    let allowed = guard.borrow().token.allows(request.headers().get(header::AUTHORIZATION));
    if allowed {
        return next.run(request).await;
    }
    serve::refuse_token(&request);
    let scheme = [(header::WWW_AUTHENTICATE, "Bearer realm=\"weft\"")];
    (scheme, Refusal::unauthorized()).into_response()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_token_file_is_for_its_owner_and_holds_enough() {
        let path = std::env::temp_dir().join(format!("weft-token-{}", std::process::id()));
        let read = |text: &str, mode| {
            fs::write(&path, text).expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set");
            Token::read(&path).map_err(|error| error.chain())
        };
        let good = format!("{}\n", "t".repeat(TOKEN_BYTES_MIN));
        for mode in [0o600, 0o400, 0o440] {
            read(&good, mode).expect("fine");
        }
        for mode in [0o644, 0o604, 0o660, 0o601] {
            let refused = read(&good, mode).expect_err("others can get at it");
            assert!(refused.contains("chmod 0600"), "{refused}");
        }
        for text in ["", "short\n", &"t".repeat(TOKEN_BYTES_MIN - 1), &"t u ".repeat(20)] {
            let refused = read(text, 0o600).expect_err(text);
            assert!(refused.contains("at least 32"), "{refused}");
        }
        fs::remove_file(&path).expect("removed");
        assert!(Token::read(&path).is_err());
    }

    #[test]
    fn only_the_whole_token_is_let_in() {
        let token = Token("0123456789".repeat(4));
        let allows = |text: &str| token.allows(Some(&HeaderValue::from_str(text).expect("text")));
        assert!(allows(&format!("Bearer {}", token.0)) && allows(&format!("bearer {}", token.0)));
        assert!(!token.allows(None));
        for wrong in ["", "Bearer", "Bearer ", "Basic 0123456789", "Bearer 0123456789"] {
            assert!(!allows(wrong), "{wrong}");
        }
        assert!(!allows(&format!("Bearer {}x", token.0)));
        assert!(!allows(&format!("Bearer  {}", token.0)));
    }
}
