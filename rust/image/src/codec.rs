//! How the bytes of a frame are made smaller, and made whole again without trust in what they say.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

/// Zstandard's levels as this format uses them; higher ones need more memory than they save on frames of 1 MiB.
const ZSTD_LEVELS: std::ops::RangeInclusive<i32> = 1..=19;
const ZSTD_DEFAULT: i32 = 3;

/// How the data of an image is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Not at all: pages can be mapped, and are written and read without a copy.
    #[default]
    None,
    /// LZ4: quick.
    Lz4,
    /// Zstandard at a level from 1 to 19: small.
    Zstd(i32),
}

impl FromStr for Compression {
    type Err = String;

    /// `none`, `lz4`, `zstd` or `zstd:LEVEL`; also runsc's `flate-best-speed`, which asks for whatever is quickest.
    fn from_str(text: &str) -> Result<Compression, String> {
        match text.split_once(':') {
            None if matches!(text, "" | "none") => Ok(Compression::None),
            None if matches!(text, "lz4" | "flate-best-speed") => Ok(Compression::Lz4),
            None if text == "zstd" => Ok(Compression::Zstd(ZSTD_DEFAULT)),
            Some(("zstd", level)) => {
                let level = level.parse().ok().filter(|level| ZSTD_LEVELS.contains(level));
                level
                    .map(Compression::Zstd)
                    .ok_or_else(|| format!("{text:?}: zstd has levels 1 to 19"))
            }
            _ => Err(format!(
                "{text:?} is not one of none, lz4, zstd, zstd:LEVEL, flate-best-speed"
            )),
        }
    }
}

impl<'de> Deserialize<'de> for Compression {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Compression, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Compression::None => out.write_str("none"),
            Compression::Lz4 => out.write_str("lz4"),
            Compression::Zstd(level) => write!(out, "zstd:{level}"),
        }
    }
}

/// What frames are compressed with, as a reader must know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    Lz4,
    Zstd,
}

impl Codec {
    /// Its word in the header.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Codec::Lz4 => "lz4",
            Codec::Zstd => "zstd",
        }
    }

    /// The codec that a header asks for.
    pub(crate) fn of(requires: &[String]) -> Option<Codec> {
        let all = [Codec::Lz4, Codec::Zstd];
        all.into_iter()
            .find(|codec| requires.iter().any(|word| word == codec.word()))
    }

    /// Makes `packed` whole. `raw` has the length that it must have; what does not come to exactly that is refused, and no more memory
    /// is used, whatever `packed` says of itself. Returns whether it did.
    pub(crate) fn unpack(self, packed: &[u8], raw: &mut [u8]) -> bool {
        let len = raw.len();
        let got = match self {
            Codec::Lz4 => lz4_flex::block::decompress_into(packed, raw).ok(),
            Codec::Zstd => zstd::bulk::Decompressor::new()
                .and_then(|mut context| context.decompress_to_buffer(packed, raw))
                .ok(),
        };
        got == Some(len)
    }
}

/// Compresses frame after frame.
pub(crate) enum Encoder {
    Lz4,
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Encoder {
    /// `None` for no compression, or when there is no memory for it.
    pub(crate) fn new(how: Compression) -> Option<Encoder> {
        match how {
            Compression::None => None,
            Compression::Lz4 => Some(Encoder::Lz4),
            Compression::Zstd(level) => zstd::bulk::Compressor::new(level).ok().map(Encoder::Zstd),
        }
    }

    /// Compresses `raw` into `packed`. False if it becomes no smaller: `packed` then holds nothing of use.
    pub(crate) fn pack(&mut self, raw: &[u8], packed: &mut Vec<u8>) -> bool {
        packed.resize(lz4_flex::block::get_maximum_output_size(raw.len()), 0);
        let got = match self {
            Encoder::Lz4 => lz4_flex::block::compress_into(raw, packed).ok(),
            // What does not fit is not worth it.
            Encoder::Zstd(context) => context.compress_to_buffer(raw, &mut packed[..]).ok(),
        };
        packed.truncate(got.unwrap_or(0));
        // A frame that saves less than a sixteenth is not worth unpacking.
        !packed.is_empty() && packed.len() < raw.len() - raw.len() / 16
    }
}

impl Compression {
    pub(crate) fn codec(self) -> Option<Codec> {
        match self {
            Compression::None => None,
            Compression::Lz4 => Some(Codec::Lz4),
            Compression::Zstd(_) => Some(Codec::Zstd),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_command_line() {
        let parse = |text: &str| text.parse::<Compression>();
        assert_eq!(parse("none"), Ok(Compression::None));
        assert_eq!(parse("lz4"), Ok(Compression::Lz4));
        assert_eq!(parse("flate-best-speed"), Ok(Compression::Lz4));
        assert_eq!(parse("zstd"), Ok(Compression::Zstd(3)));
        assert_eq!(parse("zstd:19"), Ok(Compression::Zstd(19)));
        for text in ["gzip", "zstd:0", "zstd:20", "zstd:", "lz4:1", "zstd:1:1", "ZSTD"] {
            assert!(parse(text).unwrap_err().contains(text), "{text}");
        }
    }

    #[test]
    fn what_was_packed_is_unpacked_to_exactly_its_length() {
        let raw: Vec<u8> = (0..100_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for how in [Compression::Lz4, Compression::Zstd(1), Compression::Zstd(19)] {
            let (mut packed, codec) = (Vec::new(), how.codec().unwrap());
            assert!(Encoder::new(how).unwrap().pack(&raw, &mut packed));
            let mut whole = vec![0; raw.len()];
            assert!(codec.unpack(&packed, &mut whole) && whole == raw, "{how}");
            for wrong in [0, 1, raw.len() - 1, raw.len() + 1] {
                assert!(!codec.unpack(&packed, &mut vec![0; wrong]), "{how} {wrong}");
            }
            assert!(!codec.unpack(&packed[..packed.len() - 1], &mut whole), "{how}");
            assert!(!codec.unpack(&[], &mut whole), "{how}");
        }
    }

    #[test]
    fn noise_is_not_worth_it() {
        let mut state = 1_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .take(1 << 20)
        .collect();
        for how in [Compression::Lz4, Compression::Zstd(3)] {
            assert!(!Encoder::new(how).unwrap().pack(&noise, &mut Vec::new()), "{how}");
        }
    }
}
