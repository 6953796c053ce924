//! Decodes a gzip layer and finds the seek contexts of its chunks.
//!
//! Decoding stops at every block boundary. Some boundaries become *candidates*,
//! which remember all that is needed to start there; when a chunk begins, it joins
//! the current context or opens a new one at the latest candidate.
//!
//! Contexts span about [`CONTEXT_INPUT`] bytes of the stream or [`CONTEXT_OUTPUT`]
//! of the tar: little enough that a small read costs little, enough that their
//! dictionaries are a small part of the layer.

use std::io::{self, ErrorKind, Read};
use std::sync::Arc;

use super::{ContextStart, NotInPlace, Place, Stored};
use crate::codec::MAX_UNIT;
use crate::format::context::MAX_ZRAN_INPUT;
use crate::gzip_blocks::{GzipBlocks, Place as At};

/// Longest dictionary: the window of deflate.
const WINDOW: usize = 32 << 10;
/// Output of one step. Small, because the input of a context ends with a step.
const STEP: usize = 32 << 10;
/// Length of the output buffer: a window moves once per several steps.
const BUFFER: usize = WINDOW + 8 * STEP;

/// Input after which a context is ended, in bytes.
const CONTEXT_INPUT: u64 = 512 << 10;
/// Output that a context may have if a new one can be opened, in bytes.
const CONTEXT_OUTPUT: u64 = 2 << 20;
/// Input after which a context is ended where a gzip member starts: there, a new
/// context needs no dictionary. Layers of many tiny members keep few contexts.
const MEMBER_INPUT: u64 = 64 << 10;
/// Output between two candidates of one member. Keeps copying dictionaries cheap
/// however short the blocks are.
const CANDIDATE_DISTANCE: u64 = 16 << 10;
/// First byte of every gzip member (RFC 1952).
const MAGIC: u8 = 0x1f;
/// Steps without any progress that are tolerated; a correct stream has none or two.
const IDLE_STEPS: u32 = 64;

/// The decoder of one layer.
#[derive(Debug)]
pub(super) struct Gzip {
    decoder: GzipBlocks,
    /// The last output: what was read already, as far back as needed for
    /// dictionaries, then `unread`..`filled`.
    buffer: Box<[u8]>,
    unread: usize,
    filled: usize,
    /// Bytes decoded so far; the position in the tar of `filled`.
    produced: u64,
    /// Bytes of the stream consumed by the decoder, and the last of them.
    consumed: u64,
    last_byte: u8,
    /// The decoder stands before a block, which has that many bits of `last_byte`.
    block_start: Option<u8>,
    member: Member,
    candidate: Option<Candidate>,
    context: Option<Candidate>,
    /// Position of the stream when the current chunk began, and its place in the
    /// context's output.
    chunk: (u64, u32),
}

/// The gzip member that is being decoded.
#[derive(Debug)]
struct Member {
    number: u64,
    /// Where its output starts in the tar.
    start: u64,
    state: MemberState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MemberState {
    /// It has begun.
    Inside,
    /// The last one is complete; another may follow.
    Between,
    /// There is no other.
    Ended,
}

/// A boundary where a context may start.
#[derive(Clone, Debug)]
struct Candidate {
    start: Arc<ContextStart>,
    member: u64,
}

impl Gzip {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            decoder: GzipBlocks::new().map_err(io::Error::other)?,
            buffer: vec![0; BUFFER].into_boxed_slice(),
            unread: 0,
            filled: 0,
            produced: 0,
            consumed: 0,
            last_byte: 0,
            block_start: None,
            member: Member {
                number: 1,
                start: 0,
                state: MemberState::Inside,
            },
            candidate: None,
            context: None,
            chunk: (0, 0),
        })
    }

    /// Reads bytes of the tar.
    pub(super) fn read<R: Read>(
        &mut self,
        stored: &mut Stored<R>,
        buf: &mut [u8],
    ) -> io::Result<usize> {
        if self.unread == self.filled {
            self.decode(stored)?;
        }
        let available = &self.buffer[self.unread..self.filled];
        let count = available.len().min(buf.len());
        buf[..count].copy_from_slice(&available[..count]);
        self.unread += count;
        Ok(count)
    }

    /// Chooses the context of the chunk that begins here.
    pub(super) fn begin_chunk<R: Read>(
        &mut self,
        stored: &mut Stored<R>,
        len: u32,
    ) -> io::Result<()> {
        if self.unread == self.filled {
            self.decode(stored)?;
        }
        let at = self.produced - (self.filled - self.unread) as u64;
        let end = at + u64::from(len);
        if self.wants_new_context(end) {
            self.context.clone_from(&self.candidate);
        }
        let start = self.context.as_ref().map(|context| &context.start);
        let Some(start) = start.filter(|start| end - start.output_offset <= MAX_UNIT as u64) else {
            let problem = format!(
                "a chunk of {len} bytes ends more than 16 MiB behind the deflate block boundary before it; use smaller chunks, or convert the layer instead of using it in place"
            );
            return Err(NotInPlace(problem).into());
        };
        // At most 16 MiB, as was just checked.
        let within = u32::try_from(at - start.output_offset).unwrap_or(u32::MAX);
        self.chunk = (self.consumed.max(start.input_offset), within);
        Ok(())
    }

    /// Where the chunk is that was just read.
    pub(super) fn end_chunk<R: Read>(&mut self, stored: &mut Stored<R>) -> io::Result<Place> {
        // Some decoders want to see beyond the end of a member, so the input always
        // reaches at least one byte of output further, if there is one.
        if self.unread == self.filled {
            self.decode(stored)?;
        }
        let context = self.context.as_ref().map(|context| &context.start);
        let context = Arc::clone(context.ok_or_else(|| io::Error::other("no chunk was begun"))?);
        let input = self.consumed - context.input_offset;
        if input > u64::from(MAX_ZRAN_INPUT) {
            let problem = "a chunk ends more than 32 MiB of compressed data behind the deflate block boundary before it";
            return Err(NotInPlace(problem.to_owned()).into());
        }
        let (start, within) = self.chunk;
        Ok(Place::Gzip {
            context,
            within,
            start,
            end: self.consumed,
        })
    }

    /// Whether a chunk that ends at `end` of the tar opens a context at the candidate.
    fn wants_new_context(&self, end: u64) -> bool {
        let (Some(candidate), Some(context)) = (&self.candidate, &self.context) else {
            return true;
        };
        if Arc::ptr_eq(&candidate.start, &context.start) {
            return false;
        }
        let covered = candidate.start.input_offset - context.start.input_offset;
        covered >= CONTEXT_INPUT
            || end - context.start.output_offset > CONTEXT_OUTPUT
            || candidate.member != context.member && covered >= MEMBER_INPUT
    }

    /// Makes the place where the decoder stands a candidate, if it can be one. All
    /// output before it must have been read.
    fn consider_candidate(&mut self) {
        let Some(bits) = self.block_start.take() else {
            return;
        };
        if let Some(last) = &self.candidate
            && last.member == self.member.number
            && self.produced - last.start.output_offset < CANDIDATE_DISTANCE
        {
            return;
        }
        let history = usize::try_from(self.produced - self.member.start).unwrap_or(usize::MAX);
        let history = history.min(WINDOW).min(self.filled);
        self.candidate = Some(Candidate {
            start: Arc::new(ContextStart {
                input_offset: self.consumed,
                output_offset: self.produced,
                dictionary: self.buffer[self.filled - history..self.filled].to_vec(),
                previous_byte: if bits == 0 { 0 } else { self.last_byte },
                bits,
            }),
            member: self.member.number,
        });
    }

    /// Decodes more output into the buffer, unless the stream has ended. All of the
    /// buffer must have been read.
    fn decode<R: Read>(&mut self, stored: &mut Stored<R>) -> io::Result<()> {
        let mut idle = 0;
        while self.unread == self.filled && self.member.state != MemberState::Ended {
            self.consider_candidate();
            if self.member.state == MemberState::Between && !self.next_member(stored)? {
                return Ok(());
            }
            if idle > IDLE_STEPS {
                return Err(self.damaged("the decoder makes no progress"));
            }
            idle = if self.step(stored)? { 0 } else { idle + 1 };
        }
        Ok(())
    }

    /// One call of the decoder; returns whether it did anything.
    fn step<R: Read>(&mut self, stored: &mut Stored<R>) -> io::Result<bool> {
        if self.filled + STEP > BUFFER {
            self.buffer
                .copy_within(self.filled - WINDOW..self.filled, 0);
            (self.unread, self.filled) = (WINDOW, WINDOW);
        }
        let input = stored.available()?;
        let ended = input.is_empty();
        let output = &mut self.buffer[self.filled..self.filled + STEP];
        let step = match self.decoder.step(input, output) {
            Ok(step) => step,
            Err(error) => return Err(self.damaged(error)),
        };
        if let Some(last) = input[..step.consumed].last() {
            self.last_byte = *last;
        }
        stored.consume(step.consumed);
        self.consumed += step.consumed as u64;
        self.filled += step.produced;
        self.produced += step.produced as u64;
        match step.at {
            At::BlockStart { unused_bits } => self.block_start = Some(unused_bits),
            At::MemberEnd => self.member.state = MemberState::Between,
            At::Inside if ended && step.produced == 0 => {
                return Err(self.damaged("the data ends inside a gzip member"));
            }
            At::Inside => {}
        }
        Ok(step.consumed + step.produced > 0)
    }

    /// Prepares for another member; returns whether there is one. Zeros may follow the
    /// last one: tapes and block devices have them.
    fn next_member<R: Read>(&mut self, stored: &mut Stored<R>) -> io::Result<bool> {
        let mut padding = false;
        loop {
            let available = stored.available()?;
            match available.iter().position(|byte| *byte != 0) {
                None if available.is_empty() => {
                    self.member.state = MemberState::Ended;
                    return Ok(false);
                }
                None => {
                    padding = true;
                    let count = available.len();
                    stored.consume(count);
                }
                Some(0) if !padding && available[0] == MAGIC => break,
                Some(_) => return Err(self.damaged("other data follows the last gzip member")),
            }
        }
        self.decoder.next_member().map_err(io::Error::other)?;
        self.member = Member {
            number: self.member.number + 1,
            start: self.produced,
            state: MemberState::Inside,
        };
        Ok(true)
    }

    fn damaged(&self, problem: impl std::fmt::Display) -> io::Error {
        let (number, at) = (self.member.number, self.consumed);
        let text = format!("gzip member {number}, at compressed byte {at}: {problem}");
        io::Error::new(ErrorKind::InvalidData, text)
    }
}
