//! Compressed clusters: both codecs, with contexts that are used again and again.
//!
//! Input is data of unknown origin: whatever it holds, at most one cluster comes out, and a stream that gives less
//! is an error.

use std::fmt;

use libdeflater::{CompressionLvl, Compressor, DecompressionError, Decompressor};
use zstd_safe::{CCtx, DCtx};

use super::geometry::Geometry;
use super::noise::is_noise;
use crate::storage::to_usize;

/// How the compressed clusters of an image are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate, which QEMU calls zlib.
    Deflate,
    /// Zstandard frames.
    Zstd,
}

impl fmt::Display for CompressionType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deflate => "zlib",
            Self::Zstd => "zstd",
        })
    }
}

/// Inflates clusters of either codec; one for each thread.
pub struct Inflater {
    deflate: Decompressor,
    zstd: DCtx<'static>,
}

impl Default for Inflater {
    fn default() -> Self {
        Self { deflate: Decompressor::new(), zstd: DCtx::create() }
    }
}

impl fmt::Debug for Inflater {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inflater").finish_non_exhaustive()
    }
}

impl Inflater {
    /// Fills `cluster` from `input`, which may go on behind the end of the stream.
    ///
    /// # Errors
    /// What is wrong with the stream.
    pub fn inflate(&mut self, codec: CompressionType, input: &[u8], cluster: &mut [u8]) -> Result<(), String> {
        let length = match codec {
            CompressionType::Deflate => self.inflate_deflate(input, cluster)?,
            CompressionType::Zstd => self.inflate_zstd(input, cluster)?,
        };
        if length == cluster.len() {
            return Ok(());
        }
        Err(format!("the {codec} stream holds {length} bytes, a cluster has {}", cluster.len()))
    }

    fn inflate_deflate(&mut self, input: &[u8], cluster: &mut [u8]) -> Result<usize, String> {
        self.deflate.deflate_decompress(input, cluster).map_err(|error| match error {
            DecompressionError::BadData => "not a deflate stream".to_owned(),
            DecompressionError::InsufficientSpace => "the zlib stream holds more than a cluster".to_owned(),
        })
    }

    /// Several frames may follow each other. One call a frame needs no window of its own, however large the frame
    /// says that its window is.
    fn inflate_zstd(&mut self, mut input: &[u8], cluster: &mut [u8]) -> Result<usize, String> {
        let said = |code| format!("zstd: {}", zstd_safe::get_error_name(code));
        let mut filled = 0;
        while filled < cluster.len() && !input.is_empty() {
            let length = zstd_safe::find_frame_compressed_size(input).map_err(said)?;
            let (frame, rest) = input.split_at_checked(length).ok_or("zstd: a frame beyond the end")?;
            check_window(frame)?;
            let space = cluster.get_mut(filled..).unwrap_or_default();
            filled += self.zstd.decompress(space, frame).map_err(said)?;
            input = rest;
        }
        Ok(filled)
    }
}

/// The largest window that QEMU has for a frame whose header does not tell how many bytes come out. It needs none where
/// they are told.
const WINDOW_MAX: u64 = 1 << 27;

/// What QEMU cannot read is damaged here, too: else it would be passed through to images for it.
fn check_window(frame: &[u8]) -> Result<(), String> {
    // magic, descriptor, and where no size is told the window: three bits of mantissa below the exponent
    let (Ok(None), Some(window)) = (zstd_safe::get_frame_content_size(frame), frame.get(5)) else { return Ok(()) };
    let eighth = 1_u64 << (7 + (window >> 3));
    let window = eighth * (8 + u64::from(window & 7));
    if window <= WINDOW_MAX {
        Ok(())
    } else {
        Err(format!("zstd: a window of {window} bytes, at most {WINDOW_MAX} are possible"))
    }
}

/// Deflates clusters; one for each thread.
pub struct Deflater {
    context: Context,
    buffer: Vec<u8>,
}

enum Context {
    Deflate(Compressor),
    Zstd(CCtx<'static>),
}

impl fmt::Debug for Deflater {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deflater").finish_non_exhaustive()
    }
}

impl Deflater {
    // Streams use the whole window of deflate, 32 KiB, although QEMU asks zlib for 4 KiB when it reads: it inflates a
    // cluster in one call into one buffer, so that zlib never looks into a window of its own. The tests read and boot
    // such images with QEMU 5.2, 7.2, 10.0 and 11.

    /// A level that compresses no worse than QEMU does, which takes zlib's level 6 with a window of 4 KiB. Programs,
    /// texts, JSON and logs in clusters of 64 KiB took 0.88 to 0.96 of what they take there, records of a database with
    /// random fields 1.01, in 0.3 of the time. Level 4 would save another sixth of the time, but those records and JSON
    /// then take 1.05 and 1.02; level 6 takes a sixth more time for 0.6 % less.
    const DEFLATE_LEVEL: i32 = 5;
    /// The level that QEMU uses.
    const ZSTD_LEVEL: i32 = 3;

    /// For one codec and clusters of so many bytes; no image has any above 2 MiB.
    #[must_use]
    pub fn new(codec: CompressionType, cluster_size: u64) -> Self {
        let context = match codec {
            CompressionType::Deflate => {
                let level = CompressionLvl::new(Self::DEFLATE_LEVEL).unwrap_or_default();
                Context::Deflate(Compressor::new(level))
            }
            CompressionType::Zstd => Context::Zstd(CCtx::create()),
        };
        // what is not smaller than the cluster is not wanted
        Self {
            context,
            buffer: vec![0; to_usize(cluster_size.min(1 << Geometry::CLUSTER_BITS.end()).saturating_sub(1))],
        }
    }

    /// The compressed cluster, or `None` where it would not be smaller, or hardly.
    pub fn deflate(&mut self, cluster: &[u8]) -> Option<&[u8]> {
        let length = match &mut self.context {
            Context::Deflate(_) if is_noise(cluster) => None,
            Context::Deflate(compressor) => compressor.deflate_compress(cluster, &mut self.buffer).ok(),
            Context::Zstd(context) => context.compress(self.buffer.as_mut_slice(), cluster, Self::ZSTD_LEVEL).ok(),
        };
        self.buffer.get(..length?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODECS: [CompressionType; 2] = [CompressionType::Deflate, CompressionType::Zstd];

    fn cluster() -> Vec<u8> {
        (0..65536u32).map(|i| (i / 100 % 251) as u8).collect()
    }

    #[test]
    fn what_is_deflated_is_inflated_to_the_same_with_garbage_behind_it_or_without() {
        for codec in CODECS {
            let mut stream = Deflater::new(codec, 65536).deflate(&cluster()).unwrap().to_vec();
            let mut out = vec![0; 65536];
            Inflater::default().inflate(codec, &stream, &mut out).unwrap();
            assert_eq!(out, cluster());
            stream.extend([0xa5; 300]);
            Inflater::default().inflate(codec, &stream, &mut out).unwrap();
            assert_eq!(out, cluster());
        }
    }

    #[test]
    fn a_cluster_that_does_not_shrink_is_not_compressed() {
        let mut state = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .take(4096)
        .collect();
        for codec in CODECS {
            assert!(Deflater::new(codec, 4096).deflate(&noise).is_none());
        }
    }

    #[test]
    fn streams_that_are_too_long_too_short_or_garbage_are_errors() {
        for codec in CODECS {
            let stream = Deflater::new(codec, 65536).deflate(&cluster()).unwrap().to_vec();
            for (input, size) in
                [(&stream[..], 65535), (&stream[..], 65537), (&stream[..20], 65536), (&[0x17; 64], 512)]
            {
                assert!(Inflater::default().inflate(codec, input, &mut vec![0; size]).is_err(), "{codec} {size}");
            }
        }
    }

    /// A frame of one run of bytes, with a window and without its size.
    fn run_with_window(window: u8) -> Vec<u8> {
        let mut frame = 0xfd2f_b528_u32.to_le_bytes().to_vec();
        // nothing is told in the descriptor; the last block is a run of 64 KiB
        frame.extend([0, window]);
        frame.extend((65536_u32 << 3 | 1 << 1 | 1).to_le_bytes().into_iter().take(3));
        frame.push(0x5a);
        frame
    }

    #[test]
    fn a_zstd_frame_with_a_window_that_qemu_does_not_have_is_an_error() {
        let inflate = |input: &[u8]| {
            let mut out = vec![0; 65536];
            Inflater::default().inflate(CompressionType::Zstd, input, &mut out).map(|()| out)
        };
        // 2 to the power of 27, and an eighth more
        assert_eq!(inflate(&run_with_window(17 << 3)).unwrap(), vec![0x5a; 65536]);
        for window in [17 << 3 | 1, 18 << 3, 20 << 3, 21 << 3 | 7] {
            let error = inflate(&run_with_window(window)).unwrap_err();
            assert!(error.starts_with("zstd: a window of "), "{error}");
        }
        // where the size is told, none is needed
        let mut frame = run_with_window(21 << 3 | 7);
        frame[4] = 2 << 6;
        frame.splice(6..6, 65536_u32.to_le_bytes());
        assert_eq!(inflate(&frame).unwrap(), vec![0x5a; 65536]);
    }

    #[test]
    fn several_zstd_frames_make_one_cluster() {
        let all = cluster();
        let mut stream = Vec::new();
        for half in all.chunks(32768) {
            stream.extend(Deflater::new(CompressionType::Zstd, 32768).deflate(half).unwrap());
        }
        let mut out = vec![0; 65536];
        Inflater::default().inflate(CompressionType::Zstd, &stream, &mut out).unwrap();
        assert_eq!(out, all);
    }
}
