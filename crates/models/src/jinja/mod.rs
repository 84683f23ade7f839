//! Jinja templates of files that nobody vouches for: chat templates, prompts of evaluation tasks.
//!
//! minijinja counts instructions, which bounds neither memory nor time: one instruction may double a text, another may look
//! through all of it. Its values and operators can't be watched from outside. So a template is read before it is compiled
//! ([`prepare`]): constructs that can't be bounded are refused, and what a tag computes goes through functions of this
//! module, which look at sizes and the clock:
//!
//! - Whatever is stored (`set`, `with`, a macro's arguments) is measured, all that hangs on it included. A namespace isn't
//!   put into another's field, which could make a circle.
//! - A tag has at most [`MAX_TOKENS`] tokens, so what it computes from bounded values is bounded too. Filters and methods
//!   whose results may be longer than their inputs ask for the size first.
//! - What is printed is counted, and a loop's or a macro's text whenever it begins anew.
//! - Every tag that may take long looks at the clock.
//!
//! Refused: more than [`MAX_SOURCE`] bytes; more than [`MAX_GROWTH`] `+` and `~` in a tag; `*` without a small whole number
//! on one side; more than [`MAX_ELIF`] `elif`; `include`, `import`, `extends`, `block` and `autoescape`, for which chats and
//! tasks have no use; names that begin with `__kiln`.

mod budget;
mod filters;
mod tags;

use minijinja::{Environment, Error, ErrorKind, syntax::SyntaxConfig};

pub use self::{
    budget::{Budget, check_size, stored},
    filters::{measured, within},
    tags::{check_expression, prepare},
};

/// Longest template, in bytes.
pub const MAX_SOURCE: usize = 256 << 10;
/// Tokens of a tag.
pub const MAX_TOKENS: usize = 1000;
/// Operators of a tag that add one text or list to another.
pub const MAX_GROWTH: usize = 64;
/// `elif` in a template: the parser goes one level deeper at each.
pub const MAX_ELIF: usize = 500;

/// Stack of the thread that compiles: enough for what the limits leave.
const STACK: usize = 64 << 20;

fn refused(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// Makes the environment's filters, printing and functions look at the [`Budget`], and adds those that [`prepare`] writes
/// into templates. Filters that are added later look at it by themselves or make nothing long.
pub fn protect(environment: &mut Environment<'static>) {
    budget::install(environment);
    filters::install(environment);
}

/// Compiles a template of the name, [`prepare`]d, on a thread whose stack is known.
///
/// # Errors
/// What [`prepare`] or the compiler refuse.
pub fn compile(
    environment: &mut Environment<'static>,
    name: &str,
    source: &str,
    syntax: SyntaxConfig,
) -> Result<(), Error> {
    let source = prepare(source, syntax)?;
    std::thread::scope(|scope| {
        let compiled = std::thread::Builder::new()
            .stack_size(STACK)
            .spawn_scoped(scope, || environment.add_template_owned(name.to_owned(), source));
        let compiled = compiled.map_err(|error| refused(format!("no thread to compile in: {error}")))?;
        compiled.join().unwrap_or_else(|_| Err(refused("the template can't be compiled")))
    })
}

#[cfg(test)]
mod tests;
