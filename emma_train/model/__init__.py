"""EMMA as plain torch modules: no distributed code here."""
