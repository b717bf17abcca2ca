//! Join tokens: what a workload away from the control plane's host needs for its first connection.
//!
//! `sheer1.<id>.<secret>.<root>.<addresses>`, each part base64url without padding: the token's public id (8 bytes), its
//! secret (32 bytes), the SHA-256 of the root's subject public key info (32 bytes) and the control plane's addresses
//! (`HOST:PORT`, separated by commas). With the root's hash the joining side authenticates the control plane, with the
//! secret the control plane authenticates the joining side.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use std::fmt;

/// The first part of every token of this form.
pub const PREFIX: &str = "sheer1";

/// The longest token that is looked at.
pub const MAX_LENGTH: usize = 1024;

/// A parsed join token.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Its public name.
    pub id: [u8; 8],
    /// Its secret.
    pub secret: [u8; 32],
    /// SHA-256 of the root's subject public key info (DER).
    pub root_sha256: [u8; 32],
    /// Addresses of the control plane, `HOST:PORT`.
    pub addresses: Vec<String>,
}

/// Why a text is no join token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Longer than [`MAX_LENGTH`].
    #[error("longer than a join token can be")]
    TooLong,
    /// It does not begin with `sheer1.`.
    #[error("a join token begins with 'sheer1.'; print a new one with `sheer token create`")]
    Prefix,
    /// It has not five parts, or a part of the wrong length: most often cut off when it was copied.
    #[error(
        "the join token is incomplete or damaged; copy it again, whole, or print a new one with `sheer token create`"
    )]
    Damaged,
}

impl JoinToken {
    /// Parses a token; white space around it is ignored.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.len() > MAX_LENGTH {
            return Err(TokenError::TooLong);
        }
        let mut parts = text.split('.');
        if parts.next() != Some(PREFIX) {
            return Err(TokenError::Prefix);
        }
        let mut part = || {
            let part = parts.next().ok_or(TokenError::Damaged)?;
            URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Damaged)
        };
        let (id, secret, root, addresses) = (part()?, part()?, part()?, part()?);
        if parts.next().is_some() {
            return Err(TokenError::Damaged);
        }
        let addresses = String::from_utf8(addresses).map_err(|_| TokenError::Damaged)?;
        let addresses: Vec<String> = addresses.split(',').map(str::to_owned).collect();
        if addresses.iter().any(|address| address.rsplit_once(':').is_none_or(|(host, _)| host.is_empty())) {
            return Err(TokenError::Damaged);
        }
        Ok(Self {
            id: id.try_into().map_err(|_| TokenError::Damaged)?,
            secret: secret.try_into().map_err(|_| TokenError::Damaged)?,
            root_sha256: root.try_into().map_err(|_| TokenError::Damaged)?,
            addresses,
        })
    }

    /// The text to hand to a workload. It holds the secret.
    pub fn encode(&self) -> String {
        let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        format!(
            "{PREFIX}.{}.{}.{}.{}",
            part(&self.id),
            part(&self.secret),
            part(&self.root_sha256),
            part(self.addresses.join(",").as_bytes())
        )
    }

    /// The id as it appears in logs and in the API.
    pub fn id_text(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.id)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("id", &self.id_text())
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            id: [1; 8],
            secret: [2; 32],
            root_sha256: [3; 32],
            addresses: vec!["10.0.0.1:15012".into(), "[fd00::1]:15012".into()],
        }
    }

    #[test]
    fn parses_what_it_prints() {
        assert_eq!(JoinToken::parse(&format!(" {}\n", token().encode())), Ok(token()));
    }

    #[test]
    fn a_token_cut_at_any_byte_before_its_address_is_damaged() {
        let text = token().encode();
        let end = text.rfind('.').unwrap();
        for cut in PREFIX.len() + 1..=end {
            assert_eq!(JoinToken::parse(&text[..cut]), Err(TokenError::Damaged), "{cut}");
        }
        assert_eq!(JoinToken::parse("abc"), Err(TokenError::Prefix));
        assert_eq!(JoinToken::parse(&"x".repeat(2000)), Err(TokenError::TooLong));
        assert_eq!(JoinToken::parse(&format!("{text}.x")), Err(TokenError::Damaged));
    }

    #[test]
    fn the_secret_is_not_printed_by_debug() {
        assert!(!format!("{:?}", token()).contains("2, 2"));
    }
}
