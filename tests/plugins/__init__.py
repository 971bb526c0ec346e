"""Projects beside Regrow: no file of Regrow is changed for what they bring."""
