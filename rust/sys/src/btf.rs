//! The kernel's own description of its types (BTF, /sys/kernel/btf/vmlinux; Documentation/bpf/btf.rst): where a field is.

use std::collections::HashMap;

const MAGIC: u16 = 0xeb9f;

/// A table of types.
#[derive(Debug)]
pub struct Btf<'b> {
    types: &'b [u8],
    names: &'b [u8],
    /// Where each type begins, by its number less one.
    starts: Vec<u32>,
}

/// The numbers of the kinds that are looked for, and of those that something follows.
mod kind {
    pub const INT: u32 = 1;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const FUNC: u32 = 12;
    pub const FUNC_PROTO: u32 = 13;
    pub const VAR: u32 = 14;
    pub const DATASEC: u32 = 15;
    pub const DECL_TAG: u32 = 17;
    pub const ENUM64: u32 = 19;
    pub const LAST: u32 = 19;
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at + 4)?;
    Some(u32::from_le_bytes([four[0], four[1], four[2], four[3]]))
}

/// A type's first three words.
struct Head {
    name: u32,
    kind: u32,
    count: usize,
    has_bits: bool,
}

impl<'b> Btf<'b> {
    /// Nothing when it cannot be understood.
    pub fn parse(bytes: &'b [u8]) -> Option<Btf<'b>> {
        if u16::from_le_bytes([*bytes.first()?, *bytes.get(1)?]) != MAGIC {
            return None;
        }
        let part = |at: usize| -> Option<&'b [u8]> {
            let start = word(bytes, 4)? as usize + word(bytes, at)? as usize;
            bytes.get(start..start + word(bytes, at + 4)? as usize)
        };
        let mut btf = Btf {
            types: part(8)?,
            names: part(16)?,
            starts: Vec::new(),
        };
        let mut at = 0;
        while at < btf.types.len() {
            btf.starts.push(at as u32);
            at += 12 + btf.head(at)?.tail()?;
        }
        Some(btf)
    }

    fn head(&self, at: usize) -> Option<Head> {
        let info = word(self.types, at + 4)?;
        Some(Head {
            name: word(self.types, at)?,
            kind: info >> 24 & 0x1f,
            count: (info & 0xffff) as usize,
            has_bits: info >> 31 == 1,
        })
    }

    fn is_named(&self, name: u32, wanted: &str) -> bool {
        self.names
            .get(name as usize..)
            .and_then(|rest| rest.strip_prefix(wanted.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }

    fn find(&self, kind: u32, name: &str) -> Option<u32> {
        let is_it = |at: &u32| {
            self.head(*at as usize)
                .is_some_and(|h| h.kind == kind && self.is_named(h.name, name))
        };
        self.starts.iter().position(is_it).map(|at| at as u32 + 1)
    }

    /// The number of a function.
    pub fn function(&self, name: &str) -> Option<u32> {
        self.find(kind::FUNC, name)
    }

    /// Where fields of a structure are, in bytes, also those of unnamed structures inside.
    pub fn fields(&self, structure: &str, names: &[&str]) -> Option<Vec<i16>> {
        let mut found = HashMap::new();
        self.walk(self.find(kind::STRUCT, structure)?, 0, names, &mut found, 0)?;
        names.iter().map(|name| found.get(name).copied()).collect()
    }

    fn walk<'n>(
        &self,
        number: u32,
        base: u32,
        names: &[&'n str],
        found: &mut HashMap<&'n str, i16>,
        depth: u32,
    ) -> Option<()> {
        let at = *self.starts.get(number.checked_sub(1)? as usize)? as usize;
        let head = self.head(at)?;
        if !matches!(head.kind, kind::STRUCT | kind::UNION) || depth > 8 {
            return Some(());
        }
        for member in (0..head.count).map(|i| at + 12 + i * 12) {
            let name = word(self.types, member)?;
            let bits = word(self.types, member + 8)?;
            let bits = if head.has_bits { bits & 0xff_ffff } else { bits };
            let offset = base + bits / 8;
            if name == 0 || self.is_named(name, "") {
                self.walk(word(self.types, member + 4)?, offset, names, found, depth + 1)?;
            } else if let Some(wanted) = names.iter().find(|n| self.is_named(name, n)) {
                found.insert(wanted, offset.try_into().ok()?);
            }
        }
        Some(())
    }
}

impl Head {
    /// How many bytes follow.
    fn tail(&self) -> Option<usize> {
        Some(match self.kind {
            kind::INT | kind::VAR | kind::DECL_TAG => 4,
            kind::ARRAY => 12,
            kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => self.count * 12,
            kind::ENUM | kind::FUNC_PROTO => self.count * 8,
            0 => return None,
            other if other > kind::LAST => return None,
            _ => 0,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A structure `s` with a field `a` and an unnamed union of `b` and `c`, and a function `f`.
    fn sample() -> Vec<u8> {
        let names = b"\0s\0a\0b\0c\0f\0";
        let mut types: Vec<u32> = Vec::new();
        types.extend([0, kind::INT << 24, 4, 32]);
        types.extend([1, kind::STRUCT << 24 | 2, 16, 3, 1, 0, 0, 3, 64]);
        types.extend([0, kind::UNION << 24 | 2, 8, 5, 1, 0, 7, 1, 32]);
        types.extend([9, kind::FUNC << 24, 1]);
        let types: Vec<u8> = types.iter().flat_map(|w| w.to_le_bytes()).collect();
        let mut all = vec![0x9f, 0xeb, 1, 0];
        let header = [24, 0, types.len() as u32, types.len() as u32, names.len() as u32];
        all.extend(header.iter().flat_map(|w| w.to_le_bytes()));
        all.extend(types);
        all.extend(names);
        all
    }

    #[test]
    fn fields_are_found_also_in_unnamed_parts() {
        let bytes = sample();
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(btf.fields("s", &["a", "c", "b"]), Some(vec![0, 12, 8]));
        assert_eq!(btf.fields("s", &["d"]), None);
        assert_eq!(btf.fields("t", &["a"]), None);
        assert_eq!((btf.function("f"), btf.function("s")), (Some(4), None));
    }

    #[test]
    fn what_is_cut_short_is_nothing() {
        let bytes = sample();
        for len in 0..bytes.len() {
            if let Some(btf) = Btf::parse(&bytes[..len]) {
                btf.fields("s", &["a", "b"]);
            }
        }
        assert!(Btf::parse(b"no such thing at all").is_none());
    }
}
