//! `features`: what the OCI runtime-spec calls features.md, on stdout.

use serde_json::json;

pub fn run() -> i32 {
    println!("{}", json!({"ociVersionMin": "1.0.0", "ociVersionMax": "1.2.0"}));
    0
}
