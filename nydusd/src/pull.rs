//! TODO
mod layer;
use crate::cli::MountOptions;
use crate::mounts::Source;
pub(crate) fn source(options: &MountOptions) -> anyhow::Result<Source> {
    let dir = options.localfs_dir.clone().unwrap();
    Source::local(options.image.clone().into(), &dir, &options.cache_dir)
}
