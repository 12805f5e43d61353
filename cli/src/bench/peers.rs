//! Runs a program of peers. It reads a file of tensors and answers each line of JSON with a line of
//! JSON. benches/peers/README.md describes the protocol.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::device::Place;
use crate::error::{Error, Result};

/// A running program of peers.
pub struct Peers {
    program: String,
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    pub greeting: Greeting,
}

/// The first line of a program, after it has read the tensors.
#[derive(Deserialize)]
pub struct Greeting {
    pub peers: Vec<Peer>,
    #[serde(default)]
    pub unavailable: Vec<Unavailable>,
    /// Other outputs that it can check; `moe-kernels` is ours.
    #[serde(default)]
    pub checks: Vec<String>,
}

#[derive(Deserialize, Clone)]
pub struct Peer {
    pub name: String,
    pub version: String,
    pub boundaries: Vec<String>,
}

#[derive(Deserialize, Clone)]
pub struct Unavailable {
    pub name: String,
    pub why: String,
}

#[derive(Deserialize)]
pub struct Timed {
    pub seconds: Vec<f64>,
    pub launch: Option<String>,
    pub cache: Option<String>,
    pub note: Option<String>,
}

#[derive(Deserialize)]
struct Checked {
    relative_error: f64,
}

impl Peers {
    /// Starts `program`, split at spaces, and waits until it has read the file.
    pub fn start(program: &str, place: Place, inputs: &Path) -> Result<Self> {
        let failed = |why: String| Error::Peers { program: program.into(), why };
        let mut words = program.split_whitespace();
        let executable = words.next().ok_or_else(|| failed("the command is empty".into()))?;
        let mut child = Command::new(executable)
            .args(words)
            .args(["--device", place.name(), "--inputs"])
            .arg(inputs)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| failed(format!("does not start: {error}")))?;
        let (Some(requests), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed("stdin and stdout are not connected".into()));
        };
        let mut answers = BufReader::new(answers);
        let greeting = read(&mut answers).map_err(&failed)?;
        if let Some(why) = greeting.get("error").and_then(Value::as_str) {
            return Err(failed(why.into()));
        }
        let greeting = serde_json::from_value(greeting)
            .map_err(|error| failed(format!("its first line does not list peers: {error}")))?;
        Ok(Self { program: program.into(), child, requests, answers, greeting })
    }

    /// Requests the relative error of a peer's output; `moe-kernels` is ours. The inner error is
    /// the peer's.
    pub fn check(&mut self, peer: &str) -> Result<std::result::Result<f64, String>> {
        let answer = self.request::<Checked>(&json!({ "check": peer }))?;
        Ok(answer.map(|checked| checked.relative_error))
    }

    /// Requests the times of single calls. The inner error is the peer's.
    pub fn time(
        &mut self,
        peer: &str,
        boundary: &str,
        samples: usize,
    ) -> Result<std::result::Result<Timed, String>> {
        let request = json!({ "time": peer, "boundary": boundary, "samples": samples });
        let answer = self.request::<Timed>(&request)?;
        Ok(answer.and_then(|timed| match timed.seconds.as_slice() {
            [] => Err("no times".into()),
            _ => Ok(timed),
        }))
    }

    fn request<T: DeserializeOwned>(
        &mut self,
        request: &Value,
    ) -> Result<std::result::Result<T, String>> {
        let failed = |why: String| Error::Peers { program: self.program.clone(), why };
        writeln!(self.requests, "{request}")
            .and_then(|()| self.requests.flush())
            .map_err(|error| failed(format!("does not read its stdin: {error}")))?;
        let answer = read(&mut self.answers).map_err(&failed)?;
        if let Some(why) = answer.get("error").and_then(Value::as_str) {
            return Ok(Err(why.into()));
        }
        serde_json::from_value(answer.clone())
            .map(Ok)
            .map_err(|error| failed(format!("answered {answer} to {request}: {error}")))
    }
}

fn read(answers: &mut impl BufRead) -> std::result::Result<Value, String> {
    let mut line = String::new();
    match answers.read_line(&mut line) {
        Ok(0) => Err("ended before it answered".into()),
        Ok(_) => serde_json::from_str(&line)
            .map_err(|error| format!("answered '{}': {error}", line.trim())),
        Err(error) => Err(format!("no answer: {error}")),
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        // It has no output to finish, and may use gigabytes.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
