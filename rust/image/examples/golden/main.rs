//! `cargo run -p torpor-image --example golden -- DIR` writes the golden image of this format version into DIR.

mod image;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::args_os().nth(1).ok_or("give the directory to write to")?;
    let committed = image::write(dir.as_ref())?;
    println!(
        "{} bytes, digest {}: {}",
        committed.bytes,
        committed.digest,
        committed.path.display()
    );
    Ok(())
}
