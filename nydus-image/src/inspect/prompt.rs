//! The prompt: one command a line, until `exit` or the end of the input.

use std::io::BufRead;

use anyhow::Context as _;
use rafs::Image;

use super::request;
use crate::output::print;

/// What asks for a command.
const PROMPT: &str = "Inspecting RAFS :> ";

/// Reads commands from `input` and prints answers.
///
/// A command that cannot be carried out is reported, and the next one is read.
///
/// # Errors
/// Standard input or output failed.
pub fn run(image: &Image, mut input: impl BufRead) -> anyhow::Result<()> {
    let mut dir = image.root();
    loop {
        print(PROMPT)?;
        let mut line = String::new();
        let read = input.read_line(&mut line);
        if read.context("cannot read a command from standard input")? == 0 {
            return print("\n");
        }
        match line.trim() {
            "" => {}
            "exit" | "q" | "quit" => return Ok(()),
            command => match request::text(image, &mut dir, command) {
                Ok(text) => print(&text)?,
                Err(error) => print(&format!("{error:#}\n"))?,
            },
        }
    }
}
