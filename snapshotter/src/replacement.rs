//! The program of daemons across lives of this one: an upgrade lasts until the
//! configuration names another program.

use std::path::Path;

use crate::error::{Error, chain};
use crate::lifecycle::Snapshots;
use crate::store::Replacement;

impl Snapshots {
    /// Has all daemons run another program, also after the next start.
    ///
    /// * `version`: the version it must have; any if empty.
    ///
    /// # Errors
    /// As [`Daemons::upgrade`](crate::daemons::Daemons::upgrade); or nobody will know of it
    /// after the next start.
    pub fn upgrade(&self, program: &Path, version: &str) -> Result<(), Error> {
        self.daemons.upgrade(program, version)?;
        let replacement = Replacement {
            program: program.to_owned(),
            instead_of: self.configured.clone(),
        };
        self.store.set_replacement(Some(&replacement))
    }

    /// Goes on with the program of the last upgrade, unless the configuration names another
    /// one than it did then.
    ///
    /// # Errors
    /// The records cannot be read or written.
    pub fn resume_upgrade(&self) -> Result<(), Error> {
        let Some(known) = self.store.replacement()? else {
            return Ok(());
        };
        let (program, configured) = (known.program.display(), self.configured.display());
        if known.instead_of != self.configured {
            tracing::info!("daemons run {configured}, as configured since, not {program}");
            return self.store.set_replacement(None);
        }
        match self.daemons.start_with(&known.program) {
            Ok(()) => tracing::info!("daemons run {program} since they were upgraded"),
            // It may be there again at the next start.
            Err(error) => tracing::error!("daemons run {configured}: {}", chain(&error)),
        }
        Ok(())
    }
}
