//! Turns the bytes of one request into chunks, as they stream in.
//!
//! Bytes arrive in order and in pieces of any size. As soon as all of a [`Job`]'s
//! bytes are there it is decoded, each chunk is verified, written and published,
//! and its waiters wake; the rest of the request may still be under way.
//!
//! Promise: memory holds the bytes from the first unfinished job on, which is at
//! most one request, and one decoded job.

use std::collections::VecDeque;
use std::ops::Range;

use super::flight::{Claim, Outcome};
use super::plan::{Decode, Member, Piece};
use super::{Filler, Request};
use crate::backend::{ServedBy, Stop};
use crate::codec::{self, CodecError, as_u64};
use crate::error::ReadError;
use crate::sync::{Arc, Ordering};
use crate::units::ChunkIndex;

/// A piece, and the duty to deliver some of its chunks.
#[derive(Debug)]
pub(super) struct Job<'a> {
    pub(super) stored: Range<u64>,
    pub(super) decode: Decode,
    pub(super) chunks: Vec<(Member, Claim<'a>)>,
}

impl<'a> Job<'a> {
    /// Pairs the members of `piece` with their claims; `None` if there are none.
    pub(super) fn new(piece: Piece, claims: Vec<Claim<'a>>) -> Option<Self> {
        let mut claims = claims.into_iter().peekable();
        let claimed = |member: &Member| claims.next_if(|claim| claim.index() == member.index);
        let chunks: Vec<_> = piece
            .members
            .into_iter()
            .scan(claimed, |claimed, member| {
                let claim = claimed(&member);
                Some(claim.map(|claim| (member, claim)))
            })
            .flatten()
            .collect();
        (!chunks.is_empty()).then_some(Self {
            stored: piece.stored,
            decode: piece.decode,
            chunks,
        })
    }

    /// The first of its chunks that are wanted.
    pub(super) fn first_chunk(&self) -> ChunkIndex {
        let first = self.chunks.first();
        first.map_or_else(ChunkIndex::default, |(member, _)| member.index)
    }

    pub(super) fn fail(self, error: &ReadError, request: &mut Request<'_>) {
        for (_, claim) in self.chunks {
            request.land(claim, Outcome::Failed(error.clone()));
        }
    }
}

/// The receiving end of one request.
pub(super) struct Unpacker<'f, 'a> {
    filler: &'f Filler<'a>,
    pub(super) jobs: VecDeque<Job<'a>>,
    /// Bytes received and still needed.
    window: Vec<u8>,
    /// Position of the window in the stored blob.
    at: u64,
    /// Decoded bytes; kept between jobs so that it is not cleared for each.
    scratch: Vec<u8>,
    pub(super) received: u64,
    /// Jobs whose bytes are wrong, and came from somebody else than the source itself.
    pub(super) doubtful: Vec<(Job<'a>, ReadError)>,
    /// Whether the source itself is asked: then wrong bytes are an error.
    direct: bool,
}

impl<'f, 'a> Unpacker<'f, 'a> {
    /// * `at`: position of the first byte that will arrive.
    /// * `direct`: whether the source itself is asked.
    pub(super) fn new(
        filler: &'f Filler<'a>,
        jobs: VecDeque<Job<'a>>,
        at: u64,
        direct: bool,
    ) -> Self {
        Self {
            filler,
            jobs,
            window: Vec::new(),
            at,
            scratch: Vec::new(),
            received: 0,
            doubtful: Vec::new(),
            direct,
        }
    }

    /// Takes the next bytes.
    pub(super) fn feed(
        &mut self,
        bytes: &[u8],
        served_by: &ServedBy,
        request: &mut Request<'_>,
    ) -> Result<(), Stop> {
        if self.filler.state.stopped.load(Ordering::Relaxed) {
            return Err(Stop);
        }
        self.received += as_u64(bytes.len());
        self.window.extend_from_slice(bytes);
        loop {
            self.forget_gap();
            let Some(job) = self.jobs.pop_front() else {
                break;
            };
            match self.window.get(..window_len(&job.stored)) {
                Some(stored) if self.at == job.stored.start => {
                    let doubtful = !self.direct && served_by.is_second_hand();
                    let wrong = doubtful.then_some(&mut self.doubtful);
                    self.filler
                        .unpack(job, stored, &mut self.scratch, (request, wrong));
                }
                _ => {
                    self.jobs.push_front(job);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Drops bytes before the next job: a gap, or what earlier jobs needed.
    fn forget_gap(&mut self) {
        let next = self.jobs.front().map_or(u64::MAX, |job| job.stored.start);
        let unneeded = usize::try_from(next.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let unneeded = unneeded.min(self.window.len());
        self.window.drain(..unneeded);
        self.at += as_u64(unneeded);
    }
}

fn first_error(checked: &Result<Vec<Result<&[u8], ReadError>>, ReadError>) -> Option<ReadError> {
    match checked {
        Ok(chunks) => chunks
            .iter()
            .find_map(|chunk| chunk.as_ref().err().cloned()),
        Err(error) => Some(error.clone()),
    }
}

fn window_len(stored: &Range<u64>) -> usize {
    usize::try_from(stored.end.saturating_sub(stored.start)).unwrap_or(usize::MAX)
}

impl<'a> Filler<'a> {
    /// Decodes a job and publishes its chunks.
    ///
    /// * `wrong`: where a job goes that does not hold what it should, if there is
    ///   somebody better to ask.
    fn unpack(
        &self,
        job: Job<'a>,
        stored: &[u8],
        scratch: &mut Vec<u8>,
        (request, wrong): (&mut Request<'_>, Option<&mut Vec<(Job<'a>, ReadError)>>),
    ) {
        let checked = self
            .cores
            .run(|| self.decode_and_verify(&job, stored, scratch));
        if let Some(wrong) = wrong
            && let Some(error) = first_error(&checked)
        {
            super::add(&self.metrics.verify_failures, 1);
            wrong.push((job, error));
            return;
        }
        let checked = match checked {
            Ok(checked) => checked,
            Err(error) => {
                super::add(&self.metrics.verify_failures, as_u64(job.chunks.len()));
                return job.fail(&error, request);
            }
        };
        for ((member, claim), bytes) in job.chunks.into_iter().zip(checked) {
            let outcome = match bytes {
                Ok(bytes) => self.publish(&member, bytes),
                Err(error) => {
                    super::add(&self.metrics.verify_failures, 1);
                    Outcome::Failed(error)
                }
            };
            request.land(claim, outcome);
        }
    }

    /// The bytes of each of the job's chunks, or what is wrong with them.
    ///
    /// # Errors
    /// The job as a whole cannot be decoded.
    fn decode_and_verify<'b>(
        &self,
        job: &Job<'_>,
        stored: &'b [u8],
        scratch: &'b mut Vec<u8>,
    ) -> Result<Vec<Result<&'b [u8], ReadError>>, ReadError> {
        let decoded = self.decode(job, stored, scratch)?;
        let bytes = |member: &Member| {
            let rest = decoded.get(super::usize_of(member.within)..)?;
            rest.get(..super::usize_of(member.size))
        };
        let verify =
            |(member, _): &(Member, Claim<'_>)| self.verify(member, bytes(member).unwrap_or(&[]));
        Ok(job.chunks.iter().map(verify).collect())
    }

    fn decode<'b>(
        &self,
        job: &Job<'_>,
        stored: &'b [u8],
        scratch: &'b mut Vec<u8>,
    ) -> Result<&'b [u8], ReadError> {
        let needed = job
            .chunks
            .iter()
            .map(|(member, _)| super::usize_of(member.within) + super::usize_of(member.size))
            .max()
            .unwrap_or(0);
        let len = match job.decode {
            Decode::Raw => return Ok(stored),
            Decode::Batch(batch) => super::usize_of(batch.uncompressed_size),
            Decode::Single | Decode::Zran(_) => needed,
        };
        if scratch.len() < len {
            scratch.resize(len, 0);
        }
        let output = scratch.get_mut(..len).unwrap_or_default();
        let result = if let Decode::Zran(context) = job.decode {
            let context = self
                .table
                .zran_context(context)
                .map_err(|e| self.table_error(e))?;
            codec::zran::decode(&context, stored, output)
        } else {
            codec::decompress_into(self.info.compressor, stored, output)
        };
        result.map_err(|error| self.decode_error(job, error))?;
        Ok(output)
    }

    fn decode_error(&self, job: &Job<'_>, error: CodecError) -> ReadError {
        let first = job.chunks.first();
        ReadError::Decode {
            blob: self.info.id.clone(),
            index: first.map_or_else(Default::default, |(member, _)| member.index),
            source: Arc::new(error),
        }
    }
}
