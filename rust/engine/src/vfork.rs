//! Processes between vfork(2) and execve(2): they run in the memory of their parent, one of whose threads sleeps until
//! they are done and cannot be stopped meanwhile.

use torpor_sys::kcmp::{self, Kind};
use torpor_sys::{Pid, proc};

/// The processes that a thread of `parent` sleeps for, each before its own children. Empty when `tid`, a thread of it,
/// is not in such a sleep.
pub fn borrowers(tid: Pid, parent: Pid) -> Vec<Pid> {
    if !proc::stat(tid).is_ok_and(|s| s.state == 'D') {
        return Vec::new();
    }
    let mut all = Vec::new();
    let mut at = parent;
    loop {
        let shares = |child: &Pid| kcmp::same(parent, *child, Kind::Vm).unwrap_or(false);
        all.extend(proc::children(at).unwrap_or_default().into_iter().filter(shares));
        let next = all.iter().position(|p| *p == at).map_or(0, |n| n + 1);
        match all.get(next) {
            Some(pid) => at = *pid,
            None => return all,
        }
    }
}
