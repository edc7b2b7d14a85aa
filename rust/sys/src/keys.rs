//! The kernel's key rings (keyrings(7)), as far as they tell whose they are.

const KEYCTL_GET_KEYRING_ID: i32 = 0;
const KEY_SPEC_SESSION_KEYRING: i32 = -3;

/// The serial number of our own session's key ring; `None` where there is none.
pub fn own_session() -> Option<i64> {
    // SAFETY: plain numbers.
    let serial = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 0) };
    (serial > 0).then_some(serial)
}
