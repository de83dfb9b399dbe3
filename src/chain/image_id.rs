//! What tells an image from all others, whatever its name and time: it is in its manifest, in the header of its checksums, and
//! in the manifest of the INC that builds on it. So whatever was exchanged of these is noticed.

use std::fmt;
use std::io;

use super::id::random_bytes;

/// 16 random bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImageId([u8; 16]);

impl ImageId {
    /// One that nobody has yet.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn random() -> io::Result<Self> {
        random_bytes().map(Self)
    }

    /// One of 32 hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let is_id = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = is_id.then(|| u128::from_str_radix(text, 16).ok()).flatten()?;
        Some(Self(number.to_be_bytes()))
    }

    pub(super) const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    pub(super) const fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_as_it_is_written_and_no_two_are_the_same() {
        let (one, other) = (ImageId::random().unwrap(), ImageId::random().unwrap());
        assert_ne!(one, other);
        assert_eq!(ImageId::parse(&one.to_string()), Some(one));
        assert_eq!(ImageId::from_bytes(one.to_bytes()), one);
        for wrong in [
            "",
            "0123456789abcdef0123456789abcde",
            "0123456789abcdef0123456789abcdeg",
            "+123456789abcdef0123456789abcdef",
        ] {
            assert_eq!(ImageId::parse(wrong), None, "{wrong}");
        }
    }
}
