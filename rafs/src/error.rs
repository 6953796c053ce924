//! Why a bootstrap could not be read or written.
