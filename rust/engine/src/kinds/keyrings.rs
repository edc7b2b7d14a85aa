//! Key rings of threads, processes and sessions (keyrings(7)). Keys are not carried: what a key is made of cannot be read
//! back in general. Empty rings are made anew by whoever starts the container; rings with keys are refused.

use torpor_sys::Pid;
use torpor_sys::keys;
use torpor_sys::remote::{Batch, Data, Results};

use crate::error::{Error, Result};

const GET_KEYRING_ID: i32 = 0;
const DESCRIBE: i32 = 6;
const READ: i32 = 11;
/// KEY_SPEC_THREAD_KEYRING, _PROCESS_, _SESSION_.
const RINGS: [(i32, &str); 3] = [
    (-1, "thread key ring"),
    (-2, "process key ring"),
    (-3, "session key ring"),
];
/// Room for a ring's description: kind, user, group, permissions and name.
const ROOM: usize = 256;
/// Bytes of a key's serial number, which is what reading a ring gives.
const SERIAL: i64 = 4;

/// Places of answers.
#[derive(Debug)]
pub struct Asked {
    sizes: [usize; 3],
    session: usize,
    described: Data,
}

/// Asks inside a thread. A ring that does not exist is not made, but for the session's: looking for it gives a thread
/// that has none that of its user, as any use of keys would.
pub fn ask(batch: &mut Batch) -> Asked {
    let keyctl = libc::SYS_keyctl;
    let described = batch.room(ROOM);
    let sizes = RINGS.map(|(ring, what)| batch.may(what, keyctl, [READ.into(), ring.into(), 0.into(), 0.into()]));
    let session = RINGS[2].0;
    let args = [DESCRIBE.into(), session.into(), described.into(), ROOM.into()];
    batch.may("description of the session key ring", keyctl, args);
    Asked {
        sizes,
        session: batch.may(
            "session key ring",
            keyctl,
            [GET_KEYRING_ID.into(), session.into(), 0.into()],
        ),
        described,
    }
}

/// # Errors
/// Refused: a ring with keys, unless it is the one that every process of its user has, or that of our own session.
pub fn check(tid: Pid, asked: &Asked, results: &Results) -> Result<()> {
    for ((ring, what), size) in RINGS.into_iter().zip(asked.sizes) {
        let keys = results.raw(size) / SERIAL;
        if keys > 0 && !(ring == RINGS[2].0 && belongs_outside(asked, results)) {
            let why = format!("it holds {keys} keys, which are not carried");
            return Err(Error::unsupported(tid, what, why, "remove them (keyctl clear)"));
        }
    }
    Ok(())
}

fn belongs_outside(asked: &Asked, results: &Results) -> bool {
    let text = String::from_utf8_lossy(results.bytes(asked.described));
    let is_of_user = text.split('\0').next().is_some_and(|d| d.contains(";_uid"));
    is_of_user || keys::own_session() == Some(results.raw(asked.session))
}
