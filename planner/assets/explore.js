window.dash_clientside = window.dash_clientside || {};
window.dash_clientside.explore = {
  // The page's address always leads to what its fields say.
  share: query => history.replaceState(null, "", query),

  copy: clicks => clicks && navigator.clipboard.writeText(document.getElementById("command").textContent),

  // Mark the field that an error is about, and move the error below it.
  mark: (text, name) => {
    const error = document.getElementById("error"), field = text && document.getElementById(name);
    [...document.getElementById("controls").children].filter(item => item !== error).forEach((item, place) => {
      item.style.order = 2 * place;
      if (field && item.contains(field)) error.style.order = 2 * place + 1;
    });
    document.querySelectorAll("[aria-invalid]").forEach(old => old.removeAttribute("aria-invalid"));
    if (field) {
      field.setAttribute("aria-invalid", "true");
      field.setAttribute("aria-describedby", "error");
    }
  },
};
