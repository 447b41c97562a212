"""Prints the .env that compose.yaml wants, with new secrets, one of them signed with another."""

import secrets

import jwt

signed_with = secrets.token_urlsafe(48)
print(f"POSTGRES_PASSWORD={secrets.token_urlsafe(24)}")
print(f"PGRST_JWT_SECRET={signed_with}")
print(f"SUPABASE_KEY={jwt.encode({'role': 'service_role'}, signed_with, algorithm='HS256')}")
