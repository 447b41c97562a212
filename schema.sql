-- chatd's schema for Supabase and PostgreSQL 13 or newer.
--
-- Run it whole: in Supabase's SQL editor, or with `chatd migrate`. Running it again changes
-- nothing, and tables of the first version (chatbots, sessions, conversations) are adopted with
-- their rows. Only service_role may use what stands here: row-level security is on without any
-- policy, and functions are revoked from everybody else.

BEGIN;

-- Tables. The columns of the first version stand in CREATE TABLE, all later ones are added.

CREATE TABLE IF NOT EXISTS public.chatbots (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    api_key text NOT NULL UNIQUE,
    model_name text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE public.chatbots ADD COLUMN IF NOT EXISTS name text NOT NULL DEFAULT 'Chatbot';
ALTER TABLE public.chatbots ADD COLUMN IF NOT EXISTS settings jsonb NOT NULL DEFAULT '{}';

CREATE TABLE IF NOT EXISTS public.sessions (
    session_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    chatbot_id uuid NOT NULL REFERENCES public.chatbots (id) ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE public.sessions ADD COLUMN IF NOT EXISTS channel text;
ALTER TABLE public.sessions ADD COLUMN IF NOT EXISTS user_id text;
ALTER TABLE public.sessions ADD COLUMN IF NOT EXISTS metadata jsonb NOT NULL DEFAULT '{}';

CREATE TABLE IF NOT EXISTS public.conversations (
    id bigserial PRIMARY KEY,
    session_id uuid NOT NULL REFERENCES public.sessions (session_id) ON DELETE CASCADE,
    role text NOT NULL,
    content text NOT NULL,
    "timestamp" timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE public.conversations ADD COLUMN IF NOT EXISTS turn_id uuid;

CREATE TABLE IF NOT EXISTS public.turns (
    turn_id uuid PRIMARY KEY,
    session_id uuid NOT NULL REFERENCES public.sessions (session_id) ON DELETE CASCADE,
    seq integer NOT NULL,
    status text NOT NULL,
    label text,
    idempotency_key text,
    request_hash text,
    lease_until timestamptz NOT NULL,
    rerunnable boolean NOT NULL DEFAULT false,
    run integer NOT NULL DEFAULT 1,
    reply_id bigint,
    model text,
    provider text,
    finish_reason text,
    error_code text,
    input_tokens bigint,
    output_tokens bigint,
    cached_tokens bigint,
    reasoning_tokens bigint,
    cost_usd double precision,
    attempts jsonb NOT NULL DEFAULT '[]',
    rating text,
    comment text,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz
);

CREATE INDEX IF NOT EXISTS sessions_of_chatbot ON public.sessions (chatbot_id);
CREATE INDEX IF NOT EXISTS conversations_of_session ON public.conversations (session_id, id);
CREATE UNIQUE INDEX IF NOT EXISTS turns_of_session ON public.turns (session_id, seq);
CREATE UNIQUE INDEX IF NOT EXISTS one_running_turn ON public.turns (session_id)
    WHERE status = 'running';
CREATE UNIQUE INDEX IF NOT EXISTS one_turn_per_key ON public.turns (session_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS running_leases ON public.turns (lease_until) WHERE status = 'running';

-- API keys are stored as "sha256:<hex>", however they are written.

CREATE OR REPLACE FUNCTION public.chatd_hash_api_key() RETURNS trigger
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
    IF NEW.api_key !~ '^sha256:[0-9a-f]{64}$' THEN
        NEW.api_key := 'sha256:' || encode(sha256(convert_to(NEW.api_key, 'UTF8')), 'hex');
    END IF;
    RETURN NEW;
END $$;

DROP TRIGGER IF EXISTS chatd_hash_api_key ON public.chatbots;
CREATE TRIGGER chatd_hash_api_key BEFORE INSERT OR UPDATE OF api_key ON public.chatbots
    FOR EACH ROW EXECUTE FUNCTION public.chatd_hash_api_key();
UPDATE public.chatbots SET api_key = api_key WHERE api_key !~ '^sha256:[0-9a-f]{64}$';

-- Functions: one for each operation of chatd's storage contract (chatd/storage.py). What was
-- expected to go wrong comes back as {"error": code}; everything else is raised.

-- Not IMMUTABLE: a plan that PostgREST keeps would hold the answer and give it to anybody.
CREATE OR REPLACE FUNCTION public.chatd_schema_version() RETURNS integer
LANGUAGE sql STABLE SET search_path = '' AS $$ SELECT 1 $$;

CREATE OR REPLACE FUNCTION public.chatd_chatbot_json(b public.chatbots) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = '' AS $$
    SELECT jsonb_build_object(
        'id', b.id, 'name', b.name, 'model', b.model_name, 'api_key', b.api_key,
        'settings', b.settings, 'created_at', b.created_at, 'updated_at', b.updated_at)
$$;

CREATE OR REPLACE FUNCTION public.chatd_turn_json(wanted uuid) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = '' AS $$
    SELECT to_jsonb(t) - '{seq,run,lease_until,idempotency_key,request_hash,rerunnable}'::text[]
        || jsonb_build_object('chatbot_id', s.chatbot_id, 'reply', c.content)
    FROM public.turns t
    JOIN public.sessions s ON s.session_id = t.session_id
    LEFT JOIN public.conversations c ON c.id = t.reply_id
    WHERE t.turn_id = wanted
$$;

CREATE OR REPLACE FUNCTION public.chatd_add_chatbot(args jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    violated text;
BEGIN
    INSERT INTO public.chatbots (id, name, model_name, api_key, settings)
    VALUES ((args->>'id')::uuid, args->>'name', args->>'model', args->>'api_key',
            args->'settings');
    RETURN '{}';
EXCEPTION WHEN unique_violation THEN
    GET STACKED DIAGNOSTICS violated = CONSTRAINT_NAME;
    RETURN jsonb_build_object('error', 'conflict',
        'what', CASE WHEN violated LIKE '%api_key%' THEN 'API key' ELSE 'id' END);
END $$;

CREATE OR REPLACE FUNCTION public.chatd_update_chatbot(args jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
    UPDATE public.chatbots SET name = args->>'name', model_name = args->>'model',
        settings = args->'settings', updated_at = now()
    WHERE id = (args->>'id')::uuid;
    RETURN to_jsonb(FOUND);
END $$;

CREATE OR REPLACE FUNCTION public.chatd_set_api_key(args jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
    UPDATE public.chatbots SET api_key = args->>'api_key', updated_at = now()
    WHERE id = (args->>'id')::uuid;
    RETURN to_jsonb(FOUND);
EXCEPTION WHEN unique_violation THEN
    RETURN '{"error": "conflict", "what": "API key"}';
END $$;

CREATE OR REPLACE FUNCTION public.chatd_get_chatbot(args jsonb) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = '' AS $$
    SELECT public.chatd_chatbot_json(b) FROM public.chatbots b
    WHERE b.id = (args->>'id')::uuid
$$;

CREATE OR REPLACE FUNCTION public.chatd_get_chatbot_by_key(args jsonb) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = '' AS $$
    SELECT public.chatd_chatbot_json(b) FROM public.chatbots b WHERE b.api_key = args->>'api_key'
$$;

CREATE OR REPLACE FUNCTION public.chatd_list_chatbots(args jsonb) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = '' AS $$
    SELECT coalesce(jsonb_agg(public.chatd_chatbot_json(b) ORDER BY b.created_at, b.id), '[]')
    FROM public.chatbots b
$$;

CREATE OR REPLACE FUNCTION public.chatd_remove_chatbot(args jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
    DELETE FROM public.chatbots WHERE id = (args->>'id')::uuid;
    RETURN to_jsonb(FOUND);
END $$;

CREATE OR REPLACE FUNCTION public.chatd_allowed_origins(args jsonb) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = '' AS $$
    SELECT coalesce(jsonb_agg(DISTINCT o.origin), '[]')
    FROM public.chatbots b, jsonb_array_elements_text(
        CASE jsonb_typeof(b.settings->'allowed_origins')
            WHEN 'array' THEN b.settings->'allowed_origins' ELSE '[]' END) AS o (origin)
$$;

CREATE OR REPLACE FUNCTION public.chatd_create_session(args jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
    INSERT INTO public.sessions (session_id, chatbot_id, channel, user_id, metadata)
    VALUES ((args->>'id')::uuid, (args->>'chatbot_id')::uuid, args->>'channel',
            args->>'user_id', args->'metadata')
    ON CONFLICT (session_id) DO NOTHING;
    RETURN '{}';
EXCEPTION WHEN foreign_key_violation THEN
    RETURN '{"error": "not_found"}';
END $$;

CREATE OR REPLACE FUNCTION public.chatd_get_session(args jsonb) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = '' AS $$
    SELECT to_jsonb(s) FROM public.sessions s WHERE s.session_id = (args->>'id')::uuid
$$;

CREATE OR REPLACE FUNCTION public.chatd_delete_session(args jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
    DELETE FROM public.sessions WHERE session_id = (args->>'id')::uuid
        AND chatbot_id = (args->>'chatbot_id')::uuid;
    RETURN to_jsonb(FOUND);
END $$;

CREATE OR REPLACE FUNCTION public.chatd_list_messages(args jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = '' AS $$
DECLARE
    wanted uuid := (args->>'session_id')::uuid;
BEGIN
    PERFORM FROM public.sessions s
    WHERE s.session_id = wanted AND s.chatbot_id = (args->>'chatbot_id')::uuid;
    IF NOT FOUND THEN
        RETURN '{"error": "not_found"}';
    END IF;
    RETURN (SELECT coalesce(jsonb_agg(to_jsonb(m)), '[]') FROM (
        SELECT c.id, c.role, c.content, c."timestamp", c.turn_id FROM public.conversations c
        WHERE c.session_id = wanted
            AND c.id < coalesce((args->>'before')::bigint, 9223372036854775807)
        ORDER BY c.id DESC LIMIT (args->>'limit')::integer) m);
END $$;

-- The newest whole turns that fit the budget, newest first, and whether any were left out.
CREATE OR REPLACE FUNCTION public.chatd_history(
    wanted uuid, but uuid, budget bigint, overhead integer) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = '' AS $$
DECLARE
    found record;
    kept jsonb[] := '{}';
    whole integer := 0;
    current uuid;
BEGIN
    FOR found IN
        SELECT c.role, c.content, c.turn_id FROM public.conversations c
        LEFT JOIN public.turns t ON t.turn_id = c.turn_id
        WHERE c.session_id = wanted AND (c.turn_id IS NULL OR (c.turn_id <> but
            AND t.status IN ('completed', 'stopped', 'interrupted')))
        ORDER BY c.id DESC
    LOOP
        IF found.turn_id IS NULL OR found.turn_id IS DISTINCT FROM current THEN
            whole := cardinality(kept);
            current := found.turn_id;
        END IF;
        budget := budget - length(found.content) - overhead;
        IF budget < 0 THEN
            RETURN jsonb_build_object('history', to_jsonb(kept[1:whole]), 'truncated', true);
        END IF;
        kept := kept || jsonb_build_array(found.role, found.content);
    END LOOP;
    RETURN jsonb_build_object('history', to_jsonb(kept), 'truncated', false);
END $$;

CREATE OR REPLACE FUNCTION public.chatd_begin_turn(item jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    session uuid := (item->>'session_id')::uuid;
    turn uuid := (item->>'turn_id')::uuid;
    idempotency text := item->>'idempotency_key';
    lease timestamptz := clock_timestamp() + (item->>'lease_seconds')::float8 * interval '1 second';
    visitor text;
    running uuid;
    lost boolean;
    known record;
    newest integer;
BEGIN
    -- Locks the session, so that turns of one session begin one after the other.
    SELECT s.user_id INTO visitor FROM public.sessions s
    WHERE s.session_id = session AND s.chatbot_id = (item->>'chatbot_id')::uuid
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN '{"error": "not_found"}';
    END IF;
    SELECT t.turn_id, t.lease_until <= clock_timestamp() INTO running, lost
    FROM public.turns t WHERE t.session_id = session AND t.status = 'running';
    IF lost THEN
        UPDATE public.turns t SET status = 'interrupted', error_code = 'process_lost',
            finished_at = clock_timestamp() WHERE t.turn_id = running;
        running := NULL;
    END IF;
    IF running = turn THEN
        RETURN public.chatd_begun(item, turn, visitor);
    END IF;
    PERFORM FROM public.turns t WHERE t.turn_id = turn AND t.session_id = session;
    IF FOUND THEN
        RETURN jsonb_build_object('existing', public.chatd_turn_json(turn));
    END IF;
    SELECT coalesce(max(t.seq), 0) INTO newest FROM public.turns t WHERE t.session_id = session;
    IF idempotency IS NOT NULL THEN
        SELECT t.* INTO known FROM public.turns t
        WHERE t.session_id = session AND t.idempotency_key = idempotency;
        IF known.turn_id IS NULL THEN
            NULL;
        ELSIF known.rerunnable OR (known.status = 'interrupted' AND known.reply_id IS NULL) THEN
            IF known.request_hash IS NOT DISTINCT FROM item->>'request_hash'
                AND known.seq = newest THEN
                UPDATE public.turns t SET status = 'running', run = t.run + 1, rerunnable = false,
                    error_code = NULL, finished_at = NULL, lease_until = lease
                WHERE t.turn_id = known.turn_id;
                RETURN public.chatd_begun(item, known.turn_id, visitor);
            END IF;
            UPDATE public.turns t SET idempotency_key = NULL WHERE t.turn_id = known.turn_id;
        ELSIF known.request_hash IS DISTINCT FROM item->>'request_hash' THEN
            RETURN '{"error": "idempotency_key_reused"}';
        ELSE
            RETURN jsonb_build_object('existing', public.chatd_turn_json(known.turn_id));
        END IF;
    END IF;
    IF running IS NOT NULL THEN
        RETURN jsonb_build_object('error', 'turn_in_progress', 'turn_id', running);
    END IF;
    INSERT INTO public.turns
        (turn_id, session_id, seq, status, label, idempotency_key, request_hash, lease_until)
    VALUES (turn, session, newest + 1, 'running', item->>'label', idempotency,
        item->>'request_hash', lease);
    INSERT INTO public.conversations (session_id, role, content, turn_id)
    SELECT session, m.message->>0, m.message->>1, turn
    FROM jsonb_array_elements(item->'messages') WITH ORDINALITY AS m (message, place)
    ORDER BY m.place;
    RETURN public.chatd_begun(item, turn, visitor);
END $$;

CREATE OR REPLACE FUNCTION public.chatd_begun(item jsonb, turn uuid, visitor text) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = '' AS $$
    SELECT public.chatd_history((item->>'session_id')::uuid, turn,
        (item->>'history_chars')::bigint, (item->>'overhead_chars')::integer)
        || jsonb_build_object('turn_id', turn, 'user_id', visitor,
            'run', (SELECT t.run FROM public.turns t WHERE t.turn_id = turn))
$$;

CREATE OR REPLACE FUNCTION public.chatd_finish_turn(item jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    turn uuid := (item->>'turn_id')::uuid;
    known record;
    reply bigint;
BEGIN
    SELECT t.session_id INTO known FROM public.turns t WHERE t.turn_id = turn;
    PERFORM FROM public.sessions s WHERE s.session_id = known.session_id FOR NO KEY UPDATE;
    SELECT t.session_id, t.status, t.error_code, t.seq, t.run INTO known
    FROM public.turns t WHERE t.turn_id = turn;
    IF NOT FOUND OR known.run <> (item->>'run')::integer THEN
        RETURN 'false';
    END IF;
    IF known.status <> 'running' THEN
        IF known.error_code IS DISTINCT FROM 'process_lost' THEN
            RETURN to_jsonb(known.status = item->>'status');
        END IF;
        PERFORM FROM public.turns t WHERE t.session_id = known.session_id AND t.seq > known.seq;
        IF FOUND THEN
            RETURN 'false';
        END IF;
    END IF;
    IF item->>'reply' <> '' THEN
        INSERT INTO public.conversations (session_id, role, content, turn_id)
        VALUES (known.session_id, 'assistant', item->>'reply', turn) RETURNING id INTO reply;
    END IF;
    UPDATE public.turns t SET status = item->>'status',
        rerunnable = (item->>'rerunnable')::boolean, reply_id = reply, model = item->>'model',
        provider = item->>'provider', finish_reason = item->>'finish_reason',
        error_code = item->>'error_code', input_tokens = (item->>'input_tokens')::bigint,
        output_tokens = (item->>'output_tokens')::bigint,
        cached_tokens = (item->>'cached_tokens')::bigint,
        reasoning_tokens = (item->>'reasoning_tokens')::bigint,
        cost_usd = (item->>'cost_usd')::float8, attempts = item->'attempts',
        finished_at = clock_timestamp()
    WHERE t.turn_id = turn;
    RETURN 'true';
END $$;

-- Turns that wait at the same moment share a call: items in, answers out in the same order. One
-- item's failure is its own answer. Sessions are locked in one order, so that two calls never
-- wait for each other.
CREATE OR REPLACE FUNCTION public.chatd_begin_turns(items jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    answers jsonb[] := array_fill(NULL::jsonb, ARRAY[jsonb_array_length(items)]);
    entry record;
BEGIN
    FOR entry IN
        SELECT i.item, i.place FROM jsonb_array_elements(items) WITH ORDINALITY AS i (item, place)
        ORDER BY i.item->>'session_id', i.place
    LOOP
        BEGIN
            answers[entry.place] := public.chatd_begin_turn(entry.item);
        EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN
            answers[entry.place] := jsonb_build_object('error', 'failed', 'detail', SQLERRM);
        END;
    END LOOP;
    RETURN to_jsonb(answers);
END $$;

CREATE OR REPLACE FUNCTION public.chatd_finish_turns(items jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    answers jsonb[] := array_fill(NULL::jsonb, ARRAY[jsonb_array_length(items)]);
    entry record;
BEGIN
    FOR entry IN
        SELECT i.item, i.place FROM jsonb_array_elements(items) WITH ORDINALITY AS i (item, place)
        ORDER BY i.item->>'session_id', i.place
    LOOP
        BEGIN
            answers[entry.place] := public.chatd_finish_turn(entry.item);
        EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN
            answers[entry.place] := jsonb_build_object('error', 'failed', 'detail', SQLERRM);
        END;
    END LOOP;
    RETURN to_jsonb(answers);
END $$;

CREATE OR REPLACE FUNCTION public.chatd_renew_turns(args jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    lost jsonb;
BEGIN
    WITH asked AS (
        SELECT (v->>0)::uuid AS turn_id, (v->>1)::integer AS run
        FROM jsonb_array_elements(args->'turns') v),
    renewed AS (
        UPDATE public.turns t SET lease_until =
            clock_timestamp() + (args->>'lease_seconds')::float8 * interval '1 second'
        FROM asked a
        WHERE t.turn_id = a.turn_id AND t.run = a.run AND t.status = 'running'
        RETURNING t.turn_id)
    SELECT coalesce(jsonb_agg(a.turn_id), '[]') INTO lost FROM asked a
    WHERE a.turn_id NOT IN (SELECT r.turn_id FROM renewed r);
    RETURN lost;
END $$;

CREATE OR REPLACE FUNCTION public.chatd_get_turn(args jsonb) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = '' AS $$
    SELECT found.turn FROM (SELECT public.chatd_turn_json((args->>'id')::uuid) AS turn) found
    WHERE found.turn->>'chatbot_id' = args->>'chatbot_id'
$$;

CREATE OR REPLACE FUNCTION public.chatd_rate_turn(args jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
    UPDATE public.turns t SET rating = args->>'rating', comment = args->>'comment'
    WHERE t.turn_id = (args->>'id')::uuid AND t.session_id = (args->>'session_id')::uuid;
    RETURN to_jsonb(FOUND);
END $$;

CREATE OR REPLACE FUNCTION public.chatd_sweep(args jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    ended integer;
BEGIN
    UPDATE public.turns t SET status = 'interrupted', error_code = 'process_lost',
        finished_at = clock_timestamp()
    WHERE t.turn_id IN (
        SELECT o.turn_id FROM public.turns o
        WHERE o.status = 'running' AND o.lease_until <= clock_timestamp()
        FOR UPDATE SKIP LOCKED);
    GET DIAGNOSTICS ended = ROW_COUNT;
    RETURN to_jsonb(ended);
END $$;

-- Who may.

ALTER TABLE public.chatbots ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.sessions ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.conversations ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.turns ENABLE ROW LEVEL SECURITY;

DO $$
DECLARE
    nobody text;
    made regprocedure;
BEGIN
    FOREACH nobody IN ARRAY ARRAY['public', 'anon', 'authenticated'] LOOP
        IF nobody = 'public' OR EXISTS (SELECT FROM pg_roles WHERE rolname = nobody) THEN
            EXECUTE format('REVOKE ALL ON public.chatbots, public.sessions, public.conversations,
                public.turns FROM %s', nobody);
            EXECUTE format('REVOKE ALL ON SEQUENCE public.conversations_id_seq FROM %s', nobody);
            FOR made IN SELECT p.oid::regprocedure FROM pg_proc p
                WHERE p.pronamespace = 'public'::regnamespace AND p.proname LIKE 'chatd\_%' LOOP
                EXECUTE format('REVOKE ALL ON FUNCTION %s FROM %s', made, nobody);
            END LOOP;
        END IF;
    END LOOP;
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'service_role') THEN
        GRANT USAGE ON SCHEMA public TO service_role;
        GRANT SELECT, INSERT, UPDATE, DELETE ON public.chatbots, public.sessions,
            public.conversations, public.turns TO service_role;
        GRANT USAGE ON SEQUENCE public.conversations_id_seq TO service_role;
        FOR made IN SELECT p.oid::regprocedure FROM pg_proc p
            WHERE p.pronamespace = 'public'::regnamespace AND p.proname LIKE 'chatd\_%' LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO service_role', made);
        END LOOP;
    END IF;
END $$;

NOTIFY pgrst, 'reload schema';

COMMIT;
