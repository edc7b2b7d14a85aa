//! The functions that a vdso offers, by name, and the jumps that lead from those of one to those of another.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// Length of a jump with a 32-bit distance: opcode e9 and the distance from its end.
pub const JUMP: u64 = 5;

const PT_DYNAMIC: u32 = 2;
const DT_STRTAB: u64 = 5;
const DT_SYMTAB: u64 = 6;
const DT_STRSZ: u64 = 10;
const SYMBOL: usize = 24;
const STT_FUNC: u8 = 2;

/// Bytes that somebody else has made: nothing in them is trusted.
struct Bytes<'b>(&'b [u8]);

impl Bytes<'_> {
    fn array<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..at.checked_add(N)?)?.try_into().ok()
    }

    fn u64(&self, at: usize) -> Option<u64> {
        self.array(at).map(u64::from_le_bytes)
    }

    fn u32(&self, at: usize) -> Option<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    fn u16(&self, at: usize) -> Option<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    fn size(&self, at: usize) -> Option<usize> {
        self.u64(at).and_then(|word| usize::try_from(word).ok())
    }

    /// The values of the dynamic section by tag (elf(5)): segments of a vdso lie in memory as in the file.
    fn dynamic(&self) -> Option<BTreeMap<u64, u64>> {
        let (first, size, count) = (self.size(32)?, usize::from(self.u16(54)?), usize::from(self.u16(56)?));
        let headers = (0..count).map_while(|n| first.checked_add(n.checked_mul(size)?));
        let header = headers.into_iter().find(|at| self.u32(*at) == Some(PT_DYNAMIC))?;
        let (start, len) = (self.size(header.checked_add(8)?)?, self.size(header.checked_add(32)?)?);
        let entries = (0..len / 16).map_while(|n| start.checked_add(n * 16));
        entries
            .map(|at| Some((self.u64(at)?, self.u64(at.checked_add(8)?)?)))
            .collect()
    }

    fn text(&self, at: usize) -> Option<&str> {
        let rest = self.0.get(at..)?;
        let end = rest.iter().position(|b| *b == 0)?;
        std::str::from_utf8(&rest[..end]).ok()
    }

    fn functions(&self) -> Option<BTreeMap<String, u64>> {
        if !self.0.starts_with(b"\x7fELF\x02\x01") {
            return None;
        }
        let dynamic = self.dynamic()?;
        let of = |tag| dynamic.get(&tag).and_then(|word| usize::try_from(*word).ok());
        let (names, symbols) = (of(DT_STRTAB)?, of(DT_SYMTAB)?);
        let names_end = names.checked_add(of(DT_STRSZ)?)?.min(self.0.len());
        // The linker puts names behind symbols; how many these are is told by hash tables only, and those may be missing.
        let count = names.checked_sub(symbols)? / SYMBOL;
        let mut found = BTreeMap::new();
        for at in (0..count).map(|n| symbols + n * SYMBOL) {
            let (Some(name), Some([info]), Some(value)) = (self.u32(at), self.array(at + 4), self.u64(at + 8)) else {
                break;
            };
            let name = names.checked_add(name as usize).filter(|n| *n < names_end);
            if let (STT_FUNC, Some(name)) = (info & 0xf, name.and_then(|n| self.text(n)))
                && name.starts_with("__vdso_")
                && value < self.0.len() as u64
            {
                found.insert(name.to_owned(), value);
            }
        }
        Some(found).filter(|f| !f.is_empty())
    }
}

/// The functions of a vdso by name, each with its distance from the beginning. Other names that it has for them begin
/// at the same places.
pub fn of(code: &[u8]) -> Result<BTreeMap<String, u64>> {
    let found = Bytes(code).functions();
    found.ok_or_else(|| Error::nonsense("what it calls a vdso offers no functions"))
}

/// A jump from one address to another; `None` when it is too far.
pub fn jump(from: u64, to: u64) -> Option<[u8; JUMP as usize]> {
    let distance = i128::from(to) - i128::from(from) - i128::from(JUMP);
    let [a, b, c, d] = i32::try_from(distance).ok()?.to_le_bytes();
    Some([0xe9, a, b, c, d])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use torpor_sys::mem::Memory;
    use torpor_sys::proc;

    fn own() -> Vec<u8> {
        let me = std::process::id() as i32;
        let vmas = proc::maps(me).unwrap();
        let vdso = vmas.iter().find(|v| v.name == "[vdso]").unwrap();
        super::super::code(&Memory::open(me).unwrap(), vdso).unwrap()
    }

    #[test]
    fn the_functions_of_this_kernel_are_found() {
        let found = of(&own()).unwrap();
        for name in ["clock_gettime", "clock_getres", "gettimeofday", "time", "getcpu"] {
            assert!(found[&format!("__vdso_{name}")] > 0, "{name} {found:?}");
        }
    }

    #[test]
    fn nothing_in_a_wrong_one_is_trusted() {
        let good = own();
        let mut seed = 1u64;
        for _ in 0..20_000 {
            let mut bad = good.clone();
            for _ in 0..4 {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let at = (seed >> 33) as usize % 0x500;
                bad[at] = (seed >> 20) as u8;
            }
            let len = bad.len() as u64;
            assert!(of(&bad).is_ok_and(|f| f.values().all(|v| *v < len)) || of(&bad).is_err());
        }
        assert!(of(&good[..100]).is_err() && of(&[]).is_err());
    }

    #[test]
    fn jumps_lead_forward_and_back_and_not_too_far() {
        assert_eq!(jump(0x1000, 0x1005), Some([0xe9, 0, 0, 0, 0]));
        assert_eq!(jump(0x1000, 0x1000), Some([0xe9, 0xfb, 0xff, 0xff, 0xff]));
        assert_eq!(jump(0, 1 << 33), None);
        assert_eq!(jump(1 << 33, 0), None);
    }
}
