//! Choices out of a fuzzer's bytes. Where no more bytes are left, each choice is the first one.

/// What is left of the bytes.
pub(super) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or_default()
    }

    /// A number smaller than `end`, which is not 0, of as few bytes as it needs.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        let bytes = usize::try_from((u64::BITS - (end - 1).leading_zeros()).div_ceil(8)).unwrap_or_default();
        self.take(bytes).iter().fold(0, |number, byte| number << 8 | u64::from(*byte)) % end
    }

    pub(super) fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    pub(super) fn pick<T: Copy>(&mut self, among: &[T]) -> T {
        among[usize::try_from(self.below(among.len() as u64)).unwrap_or_default()]
    }

    /// So many bytes, or fewer at the end.
    pub(super) fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}
