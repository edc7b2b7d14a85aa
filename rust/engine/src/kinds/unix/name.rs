//! The name of a socket.

use serde::{Deserialize, Serialize};
use torpor_sys::socket::Address;

/// The name of a socket; empty when it has none, with NUL in front when it is abstract. As text, each byte is the
/// character with its number.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(pub Vec<u8>);

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0.into_iter().map(char::from).collect()
    }
}

impl TryFrom<String> for Name {
    type Error = std::char::TryFromCharError;

    fn try_from(text: String) -> std::result::Result<Name, Self::Error> {
        text.chars()
            .map(u8::try_from)
            .collect::<std::result::Result<_, _>>()
            .map(Name)
    }
}

impl Name {
    /// There is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn is_path(&self) -> bool {
        self.0.first().is_some_and(|b| *b != 0)
    }

    pub(super) fn of(address: Address) -> Name {
        match address {
            Address::Unix(name) => Name(name),
            Address::Inet(_) => Name::default(),
        }
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.split_first() {
            Some((0, rest)) => write!(f, "@{}", rest.escape_ascii()),
            _ => write!(f, "{}", self.0.escape_ascii()),
        }
    }
}
