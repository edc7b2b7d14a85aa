//! System V IPC and POSIX message queues: what has no file descriptor and no mapping, but a key or a name in an IPC
//! namespace. Not carried yet, and so refused by name.

use std::fs;

use torpor_sys::{Pid, namespace, proc, tree};

use crate::error::{About, Error, Result};

/// Where the kernel lists System V objects, what to call them, and the flag of ipcrm(1) that removes one.
const KINDS: [(&str, &str, &str); 3] = [
    ("shm", "System V shared memory", "-m"),
    ("sem", "System V semaphores", "-s"),
    ("msg", "System V message queue", "-q"),
];

/// One object.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    object: String,
    remedy: String,
}

/// # Errors
/// Refused: anything in an IPC namespace that is not also our own. What is in ours outlives the container.
pub fn check(init: Pid) -> Result<()> {
    let me = std::process::id() as Pid;
    let of = |pid: Pid| proc::namespace(pid, "ipc").about(pid, "ipc namespace");
    if of(init)? == of(me)? {
        return Ok(());
    }
    let found = namespace::within(init, &["ipc"], look).about(init, "ipc namespace")?;
    match found {
        Some(found) => Err(Error::unsupported(
            init,
            found.object,
            "it is not carried yet",
            &found.remedy,
        )),
        None => Ok(()),
    }
}

/// The first object of the namespace of the calling thread.
fn look() -> torpor_sys::Result<Option<Found>> {
    for (file, what, flag) in KINDS {
        let path = format!("/proc/sysvipc/{file}");
        match fs::read_to_string(&path) {
            Ok(text) => {
                if let Some(found) = first(&text, what, flag) {
                    return Ok(Some(found));
                }
            }
            // A kernel without System V IPC.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(torpor_sys::Error::io("read", path, &e)),
        }
    }
    let queues = tree::message_queues()?;
    Ok(queues.first().map(|name| Found {
        object: format!("POSIX message queue /{}", name.escape_ascii()),
        remedy: "remove it first, by mq_unlink(3) or in /dev/mqueue".into(),
    }))
}

/// The first line after the heading: `key id ...`, the key in decimal and signed.
fn first(text: &str, what: &str, flag: &str) -> Option<Found> {
    let mut words = text.lines().nth(1)?.split_ascii_whitespace();
    let key: i32 = words.next()?.parse().ok()?;
    let id = words.next()?;
    let key = if key == 0 {
        "IPC_PRIVATE".into()
    } else {
        format!("{key:#x}")
    };
    Some(Found {
        object: format!("{what} {id} (key {key})"),
        remedy: format!("remove it first (ipcrm {flag} {id}), or run the container in the host's IPC namespace"),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn objects_have_names() {
        let text = "       key      semid perms      nsems   uid\n -16777215          3   600          1     0\n";
        let found = first(text, "System V semaphores", "-s").unwrap();
        assert_eq!(found.object, "System V semaphores 3 (key 0xff000001)");
        assert!(found.remedy.contains("ipcrm -s 3"));
        assert_eq!(first("       key      shmid perms\n", "x", "-m"), None);
        let private = first("key shmid\n0 7 600\n", "x", "-m").unwrap();
        assert_eq!(private.object, "x 7 (key IPC_PRIVATE)");
    }
}
