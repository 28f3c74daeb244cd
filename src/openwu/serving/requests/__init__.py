"""From the body of a request to checked fields: forms.py reads it, schema.py checks it, openapi.py describes it."""
