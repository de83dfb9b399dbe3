//! A stream cut into lines of bounded length, however it is split into reads. What is in them is not known here.

use std::collections::VecDeque;

/// Bytes in, lines out.
#[derive(Debug)]
pub(crate) struct Lines {
    whole: VecDeque<Vec<u8>>,
    /// The line that has no end yet.
    partial: Vec<u8>,
    limit: usize,
    too_long: bool,
}

/// A line has more bytes than the limit. There is no way on from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLong {
    pub(crate) limit: usize,
}

impl Lines {
    /// `limit` is the most bytes of a line, without its end.
    pub(crate) fn new(limit: usize) -> Self {
        Self { whole: VecDeque::new(), partial: Vec::new(), limit, too_long: false }
    }

    /// Takes the next bytes of the stream.
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let content = piece.strip_suffix(b"\n");
            self.too_long = self.too_long || self.partial.len() + content.unwrap_or(piece).len() > self.limit;
            if self.too_long {
                self.partial = Vec::new();
                return;
            }
            self.partial.extend_from_slice(content.unwrap_or(piece));
            if content.is_some() {
                self.whole.push_back(std::mem::take(&mut self.partial));
            }
        }
    }

    /// The next whole line, without `\n`; `None` until more is fed.
    pub(crate) fn next(&mut self) -> Result<Option<Vec<u8>>, TooLong> {
        match self.whole.pop_front() {
            None if self.too_long => Err(TooLong { limit: self.limit }),
            line => Ok(line),
        }
    }

    /// What has come of a line that has no end yet.
    pub(crate) fn partial(&self) -> &[u8] {
        &self.partial
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_ends_where_it_ends_and_not_where_a_read_does() {
        let mut lines = Lines::new(8);
        lines.feed(b"ab");
        assert_eq!(lines.next(), Ok(None));
        assert_eq!(lines.partial(), b"ab");
        lines.feed(b"c\n\nd\ne");
        assert_eq!(lines.next(), Ok(Some(b"abc".to_vec())));
        assert_eq!(lines.next(), Ok(Some(Vec::new())));
        assert_eq!(lines.next(), Ok(Some(b"d".to_vec())));
        assert_eq!(lines.next(), Ok(None));
        assert_eq!(lines.partial(), b"e");
    }

    #[test]
    fn a_line_may_be_as_long_as_the_limit_and_no_longer() {
        let mut lines = Lines::new(3);
        lines.feed(b"abc\nabcd");
        lines.feed(b"\nabc\n");
        assert_eq!(lines.next(), Ok(Some(b"abc".to_vec())));
        assert_eq!(lines.next(), Err(TooLong { limit: 3 }));
        assert_eq!(lines.next(), Err(TooLong { limit: 3 }));
    }
}
