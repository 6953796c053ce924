//! Makes the Rust code of the snapshots service from its protobuf files, with a
//! compiler written in Rust. The result is part of the repository.

use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let files = protox::compile(["snapshots.proto"], [&proto])?;
    tonic_prost_build::configure()
        .out_dir(proto.join("../src/api"))
        .compile_fds(files)?;
    Ok(())
}
