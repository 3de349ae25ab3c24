//! The flag `--form`: which of the equal forms of a mixer to compute.

use super::cli::{CHUNK, Outcome};
use subquadratic::models::{Form, LanguageModel};

/// A form by its name.
pub fn parse_form(name: &str) -> Result<Form, String> {
    match name {
        "auto" => Ok(Form::Auto),
        "parallel" => Ok(Form::Parallel),
        "chunkwise" => Ok(Form::Chunkwise { chunk: CHUNK }),
        "recurrent" => Ok(Form::Recurrent),
        _ => Err("expected auto, parallel, chunkwise or recurrent".into()),
    }
}

/// Chooses a form, of a model that has several.
pub fn set_form(model: &mut LanguageModel, form: Form) -> Outcome<()> {
    match model.set_form(form)? {
        false if form != Form::Auto => Err("--form: the model has no mixer with several forms".into()),
        _ => Ok(()),
    }
}
