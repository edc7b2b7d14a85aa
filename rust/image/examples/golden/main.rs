//! `cargo run -p torpor-image --example golden -- DIR` writes the golden images of this format version into DIR.

mod image;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::args_os().nth(1).ok_or("give the directory to write to")?;
    let committed = image::write(&std::path::Path::new(&dir).join("v1"))?;
    println!(
        "{} bytes, digest {}: {}",
        committed.bytes,
        committed.digest,
        committed.path.display()
    );
    image::write_chain(&std::path::Path::new(&dir).join("v1.1"))?;
    image::write_with_connections(&std::path::Path::new(&dir).join("v1.2"))?;
    image::write_with_sharing(&std::path::Path::new(&dir).join("v1.3"))?;
    Ok(())
}
