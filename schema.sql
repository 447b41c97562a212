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
ALTER TABLE public.turns ADD COLUMN IF NOT EXISTS history_truncated boolean NOT NULL DEFAULT false;
ALTER TABLE public.turns ADD COLUMN IF NOT EXISTS stop_asked boolean NOT NULL DEFAULT false;
ALTER TABLE public.turns ADD COLUMN IF NOT EXISTS side text;

-- What the turns of erased sessions took, without what was said and by whom.
CREATE TABLE IF NOT EXISTS public.usage_of_erased (
    chatbot_id uuid NOT NULL REFERENCES public.chatbots (id) ON DELETE CASCADE,
    day date NOT NULL,
    model text,
    side text,
    turns bigint NOT NULL,
    completed bigint NOT NULL,
    failed bigint NOT NULL,
    stopped bigint NOT NULL,
    interrupted bigint NOT NULL,
    input_tokens bigint,
    output_tokens bigint,
    cached_tokens bigint,
    reasoning_tokens bigint,
    cost_usd double precision,
    unknown_cost bigint NOT NULL,
    rated_up bigint NOT NULL,
    rated_down bigint NOT NULL
);

-- The index of older versions, which the first of these does the work of.
DROP INDEX IF EXISTS public.sessions_of_chatbot;
CREATE INDEX IF NOT EXISTS sessions_by_chatbot ON public.sessions (chatbot_id, session_id);
CREATE INDEX IF NOT EXISTS sessions_by_age ON public.sessions (chatbot_id, created_at, session_id);
CREATE INDEX IF NOT EXISTS sessions_of_user ON public.sessions (user_id, session_id)
    WHERE user_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS conversations_of_session ON public.conversations (session_id, id);
CREATE UNIQUE INDEX IF NOT EXISTS turns_of_session ON public.turns (session_id, seq);
CREATE UNIQUE INDEX IF NOT EXISTS one_running_turn ON public.turns (session_id)
    WHERE status = 'running';
CREATE UNIQUE INDEX IF NOT EXISTS one_turn_per_key ON public.turns (session_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS running_leases ON public.turns (lease_until) WHERE status = 'running';
CREATE INDEX IF NOT EXISTS turns_by_start ON public.turns (started_at);
CREATE UNIQUE INDEX IF NOT EXISTS usage_of_erased_day ON public.usage_of_erased
    (chatbot_id, day, coalesce(model, ''), coalesce(side, ''));

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
LANGUAGE sql STABLE SET search_path = '' AS $$ SELECT 5 $$;

CREATE OR REPLACE FUNCTION public.chatd_chatbot_json(b public.chatbots) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = '' AS $$
    SELECT jsonb_build_object(
        'id', b.id, 'name', b.name, 'model', b.model_name, 'api_key', b.api_key,
        'settings', b.settings, 'created_at', b.created_at, 'updated_at', b.updated_at)
$$;

CREATE OR REPLACE FUNCTION public.chatd_turn_json(wanted uuid) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = '' AS $$
    SELECT to_jsonb(t) - '{seq,lease_until,idempotency_key,request_hash,rerunnable,stop_asked}'::text[]
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
    INSERT INTO public.chatbots
        (id, name, model_name, api_key, settings, created_at, updated_at)
    VALUES ((args->>'id')::uuid, args->>'name', args->>'model', args->>'api_key',
            args->'settings', coalesce((args->>'created_at')::timestamptz, now()),
            coalesce((args->>'updated_at')::timestamptz, now()));
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

-- The figures of turns, by chatbot, day, model and side: of one session with those that run, as
-- interrupted; or of all sessions, or one chatbot's, without them.
CREATE OR REPLACE FUNCTION public.chatd_usage(
    session uuid, bot uuid, since timestamptz, until timestamptz)
RETURNS SETOF public.usage_of_erased
-- Planned for what is asked: a day's turns are found by their start, a chatbot's by its sessions.
LANGUAGE plpgsql STABLE SET search_path = '' SET plan_cache_mode = force_custom_plan AS $$
BEGIN
    RETURN QUERY SELECT s.chatbot_id, (t.started_at AT TIME ZONE 'UTC')::date, t.model, t.side,
        count(*),
        count(*) FILTER (WHERE t.status = 'completed'),
        count(*) FILTER (WHERE t.status = 'failed'),
        count(*) FILTER (WHERE t.status = 'stopped'),
        count(*) FILTER (WHERE t.status IN ('interrupted', 'running')),
        sum(t.input_tokens)::bigint, sum(t.output_tokens)::bigint,
        sum(t.cached_tokens)::bigint, sum(t.reasoning_tokens)::bigint,
        sum(t.cost_usd),
        count(*) FILTER (WHERE t.cost_usd IS NULL AND NOT t.rerunnable),
        count(*) FILTER (WHERE t.rating = 'up'),
        count(*) FILTER (WHERE t.rating = 'down')
    FROM public.turns t JOIN public.sessions s ON s.session_id = t.session_id
    WHERE (session IS NOT NULL OR t.status <> 'running')
        AND (session IS NULL OR t.session_id = session)
        AND (bot IS NULL OR s.chatbot_id = bot)
        AND (since IS NULL OR t.started_at >= since)
        AND (until IS NULL OR t.started_at < until)
    GROUP BY 1, 2, 3, 4;
END $$;

CREATE OR REPLACE FUNCTION public.chatd_usage_totals(args jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = '' AS $$
DECLARE
    wanted text := args->>'by';
    bot uuid := args->>'chatbot_id';
    since timestamptz := args->>'since';
    until timestamptz := args->>'until';
BEGIN
    RETURN (SELECT coalesce(jsonb_agg(to_jsonb(total)
            ORDER BY total.chatbot_id, total.key COLLATE "C" NULLS LAST), '[]')
        FROM (SELECT u.chatbot_id, CASE wanted WHEN 'day' THEN to_char(u.day, 'YYYY-MM-DD')
                WHEN 'model' THEN u.model ELSE u.side END AS key,
            sum(u.turns)::bigint AS turns, sum(u.completed)::bigint AS completed,
            sum(u.failed)::bigint AS failed, sum(u.stopped)::bigint AS stopped,
            sum(u.interrupted)::bigint AS interrupted,
            sum(u.input_tokens)::bigint AS input_tokens,
            sum(u.output_tokens)::bigint AS output_tokens,
            sum(u.cached_tokens)::bigint AS cached_tokens,
            sum(u.reasoning_tokens)::bigint AS reasoning_tokens,
            sum(u.cost_usd)::float8 AS cost_usd, sum(u.unknown_cost)::bigint AS unknown_cost,
            sum(u.rated_up)::bigint AS rated_up, sum(u.rated_down)::bigint AS rated_down
        FROM (
            SELECT * FROM public.chatd_usage(NULL, bot, since, until)
            UNION ALL
            SELECT e.* FROM public.usage_of_erased e
            WHERE (bot IS NULL OR e.chatbot_id = bot)
                AND (since IS NULL OR e.day::timestamp AT TIME ZONE 'UTC' >= since)
                AND (until IS NULL OR e.day::timestamp AT TIME ZONE 'UTC' < until)) u
        GROUP BY 1, 2) total);
END $$;

-- Erases sessions that the caller has locked, and keeps what their turns took. Says how many.
CREATE OR REPLACE FUNCTION public.chatd_erase_locked(wanted uuid[]) RETURNS integer
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    erased integer;
BEGIN
    -- In one order, so that two who erase at once never wait for each other.
    INSERT INTO public.usage_of_erased AS u
    SELECT g.chatbot_id, g.day, g.model, g.side, sum(g.turns)::bigint, sum(g.completed)::bigint,
        sum(g.failed)::bigint, sum(g.stopped)::bigint, sum(g.interrupted)::bigint,
        sum(g.input_tokens)::bigint, sum(g.output_tokens)::bigint, sum(g.cached_tokens)::bigint,
        sum(g.reasoning_tokens)::bigint, sum(g.cost_usd), sum(g.unknown_cost)::bigint,
        sum(g.rated_up)::bigint, sum(g.rated_down)::bigint
    FROM unnest(wanted) AS w (id), LATERAL public.chatd_usage(w.id, NULL, NULL, NULL) g
    GROUP BY g.chatbot_id, g.day, g.model, g.side
    ORDER BY g.chatbot_id, g.day, g.model, g.side
    ON CONFLICT (chatbot_id, day, coalesce(model, ''), coalesce(side, '')) DO UPDATE SET
        turns = u.turns + excluded.turns, completed = u.completed + excluded.completed,
        failed = u.failed + excluded.failed, stopped = u.stopped + excluded.stopped,
        interrupted = u.interrupted + excluded.interrupted,
        input_tokens = coalesce(u.input_tokens + excluded.input_tokens, u.input_tokens, excluded.input_tokens),
        output_tokens = coalesce(u.output_tokens + excluded.output_tokens, u.output_tokens, excluded.output_tokens),
        cached_tokens = coalesce(u.cached_tokens + excluded.cached_tokens, u.cached_tokens, excluded.cached_tokens),
        reasoning_tokens = coalesce(u.reasoning_tokens + excluded.reasoning_tokens, u.reasoning_tokens, excluded.reasoning_tokens),
        cost_usd = coalesce(u.cost_usd + excluded.cost_usd, u.cost_usd, excluded.cost_usd),
        unknown_cost = u.unknown_cost + excluded.unknown_cost,
        rated_up = u.rated_up + excluded.rated_up,
        rated_down = u.rated_down + excluded.rated_down;
    DELETE FROM public.sessions s WHERE s.session_id = ANY (wanted);
    GET DIAGNOSTICS erased = ROW_COUNT;
    RETURN erased;
END $$;

CREATE OR REPLACE FUNCTION public.chatd_delete_session(args jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    wanted uuid := args->>'id';
BEGIN
    -- Locks the chatbot and then the session, as removing the chatbot does; no turn begins, ends
    -- or is settled now.
    PERFORM FROM public.chatbots b WHERE b.id = (args->>'chatbot_id')::uuid FOR KEY SHARE;
    PERFORM FROM public.sessions s
    WHERE s.session_id = wanted AND s.chatbot_id = (args->>'chatbot_id')::uuid FOR UPDATE;
    IF NOT FOUND THEN
        RETURN 'false';
    END IF;
    RETURN to_jsonb(public.chatd_erase_locked(ARRAY[wanted]) > 0);
END $$;

-- Whether nothing runs in a session, and nothing happened in it since.
CREATE OR REPLACE FUNCTION public.chatd_idle(wanted uuid, since timestamptz) RETURNS boolean
LANGUAGE sql STABLE SET search_path = '' AS $$
    SELECT NOT EXISTS (
            SELECT FROM public.turns t WHERE t.session_id = wanted AND t.status = 'running')
        AND coalesce((SELECT greatest(t.started_at, t.finished_at) FROM public.turns t
            WHERE t.session_id = wanted ORDER BY t.seq DESC LIMIT 1) < since, true)
        AND coalesce((SELECT c."timestamp" FROM public.conversations c
            WHERE c.session_id = wanted ORDER BY c.id DESC LIMIT 1) < since, true)
$$;

CREATE OR REPLACE FUNCTION public.chatd_erase_idle_sessions(args jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    bot uuid := args->>'chatbot_id';
    since timestamptz := args->>'before';
    most integer := args->>'limit';
    looked integer := 0;
    messages bigint := 0;
    wanted uuid[] := '{}';
    place jsonb;
    entry record;
BEGIN
    PERFORM FROM public.chatbots b WHERE b.id = bot FOR KEY SHARE;
    FOR entry IN
        SELECT s.session_id, s.created_at FROM public.sessions s
        WHERE s.chatbot_id = bot AND s.created_at < since
            AND (s.created_at, s.session_id) > (
                coalesce((args->'after'->>0)::timestamptz, '-infinity'),
                coalesce((args->'after'->>1)::uuid, '00000000-0000-0000-0000-000000000000'))
        ORDER BY s.created_at, s.session_id LIMIT most
    LOOP
        looked := looked + 1;
        IF public.chatd_idle(entry.session_id, since) THEN
            -- Passes over what another process erases, or where a turn begins. Once it is locked
            -- no turn begins; one may have, just before.
            PERFORM FROM public.sessions s WHERE s.session_id = entry.session_id
            FOR UPDATE SKIP LOCKED;
            IF FOUND AND public.chatd_idle(entry.session_id, since) THEN
                wanted := wanted || entry.session_id;
                messages := messages + (SELECT count(*) FROM public.conversations c
                    WHERE c.session_id = entry.session_id);
            END IF;
        END IF;
        -- So many that a call ends long before its time is over.
        IF looked = most OR messages > 5000 THEN
            place := jsonb_build_array(entry.created_at, entry.session_id);
            EXIT;
        END IF;
    END LOOP;
    RETURN jsonb_build_object('sessions', public.chatd_erase_locked(wanted), 'after', place);
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
-- Without sorting the index gives messages one by one, and only as many are read as fit.
LANGUAGE plpgsql STABLE SET search_path = '' SET enable_sort = off AS $$
DECLARE
    found record;
    kept jsonb[] := '{}';
    whole integer := 0;
    current uuid;
BEGIN
    FOR found IN
        SELECT c.role, c.content, c.turn_id FROM public.conversations c
        WHERE c.session_id = wanted AND (c.turn_id IS NULL OR (c.turn_id <> but
            AND (SELECT t.status FROM public.turns t WHERE t.turn_id = c.turn_id)
                IN ('completed', 'stopped', 'interrupted')))
        ORDER BY c.id DESC LIMIT greatest(budget, 0) / overhead + 1
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
                    error_code = NULL, finished_at = NULL, lease_until = lease,
                    stop_asked = false
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
        history_truncated = (item->>'history_truncated')::boolean, side = item->>'side',
        finished_at = clock_timestamp()
    WHERE t.turn_id = turn;
    RETURN 'true';
END $$;

CREATE OR REPLACE FUNCTION public.chatd_settle_turn(args jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    turn uuid := args->>'id';
BEGIN
    -- Not while the session is being erased: it would be lost, and said to be kept.
    PERFORM FROM public.sessions s WHERE s.session_id =
        (SELECT t.session_id FROM public.turns t WHERE t.turn_id = turn) FOR NO KEY UPDATE;
    UPDATE public.turns t SET input_tokens = (args->>'input_tokens')::bigint,
        output_tokens = (args->>'output_tokens')::bigint,
        cached_tokens = (args->>'cached_tokens')::bigint,
        reasoning_tokens = (args->>'reasoning_tokens')::bigint,
        cost_usd = (args->>'cost_usd')::float8
    WHERE t.turn_id = turn AND t.run = (args->>'run')::integer AND t.status <> 'running';
    RETURN to_jsonb(FOUND);
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
        ORDER BY (SELECT t.session_id::text FROM public.turns t WHERE t.turn_id =
            CASE WHEN i.item->>'turn_id' ~ '^[0-9a-f-]{36}$'
                THEN (i.item->>'turn_id')::uuid END), i.place
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
    told jsonb;
BEGIN
    WITH asked AS (
        SELECT (v->>0)::uuid AS turn_id, (v->>1)::integer AS run
        FROM jsonb_array_elements(args->'turns') v),
    renewed AS (
        UPDATE public.turns t SET lease_until =
            clock_timestamp() + (args->>'lease_seconds')::float8 * interval '1 second'
        FROM asked a
        WHERE t.turn_id = a.turn_id AND t.run = a.run AND t.status = 'running'
        RETURNING t.turn_id, t.stop_asked)
    SELECT jsonb_build_object(
        'lost', coalesce(jsonb_agg(a.turn_id) FILTER (WHERE r.turn_id IS NULL), '[]'),
        'stopping', coalesce(jsonb_agg(a.turn_id) FILTER (WHERE r.stop_asked), '[]'))
    INTO told FROM asked a LEFT JOIN renewed r ON r.turn_id = a.turn_id;
    RETURN told;
END $$;

CREATE OR REPLACE FUNCTION public.chatd_stop_turn(args jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
    UPDATE public.turns t SET stop_asked = true FROM public.sessions s
    WHERE t.turn_id = (args->>'id')::uuid AND t.status = 'running'
        AND s.session_id = t.session_id AND s.chatbot_id = (args->>'chatbot_id')::uuid;
    RETURN to_jsonb(FOUND);
END $$;

CREATE OR REPLACE FUNCTION public.chatd_running_turn(args jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = '' AS $$
BEGIN
    PERFORM FROM public.sessions s WHERE s.session_id = (args->>'session_id')::uuid
        AND s.chatbot_id = (args->>'chatbot_id')::uuid;
    IF NOT FOUND THEN
        RETURN '{"error": "not_found"}';
    END IF;
    RETURN (SELECT public.chatd_turn_json(t.turn_id) FROM public.turns t
        WHERE t.session_id = (args->>'session_id')::uuid AND t.status = 'running');
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

-- Moving (`chatd storage copy`). A message is told by its place in its session, counted from 0.

CREATE OR REPLACE FUNCTION public.chatd_list_sessions(args jsonb) RETURNS jsonb
-- Planned for what is asked: all sessions, a chatbot's or a user's.
LANGUAGE plpgsql STABLE SET search_path = '' SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    last uuid := args->>'after';
    bot uuid := args->>'chatbot_id';
    visitor text := args->>'user_id';
BEGIN
    RETURN (SELECT coalesce(jsonb_agg(to_jsonb(s) ORDER BY s.session_id), '[]') FROM (
        SELECT o.* FROM public.sessions o
        WHERE o.session_id >= coalesce(last, '00000000-0000-0000-0000-000000000000')
            AND o.session_id IS DISTINCT FROM last
            AND (bot IS NULL OR o.chatbot_id = bot)
            AND (visitor IS NULL OR o.user_id = visitor)
        ORDER BY o.session_id LIMIT (args->>'limit')::integer) s);
END $$;

CREATE OR REPLACE FUNCTION public.chatd_tally_session(item jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = '' AS $$
DECLARE
    wanted uuid := item->>'id';
BEGIN
    PERFORM FROM public.sessions s WHERE s.session_id = wanted;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    RETURN (
        SELECT jsonb_build_object('messages', c.messages, 'chars', c.chars + t.chars,
            'turns', t.turns, 'ended', t.ended, 'rated_up', t.up, 'rated_down', t.down,
            'priced', t.priced)
        FROM (SELECT count(*) AS messages, coalesce(sum(length(m.content)), 0) AS chars
              FROM public.conversations m WHERE m.session_id = wanted) c,
             (SELECT coalesce(sum(length(o.comment)), 0) AS chars, count(*) AS turns,
                  count(*) FILTER (WHERE o.status <> 'running') AS ended,
                  count(*) FILTER (WHERE o.rating = 'up') AS up,
                  count(*) FILTER (WHERE o.rating = 'down') AS down,
                  count(o.cost_usd) AS priced
              FROM public.turns o WHERE o.session_id = wanted) t);
END $$;

CREATE OR REPLACE FUNCTION public.chatd_export_session(item jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = '' AS $$
DECLARE
    wanted uuid := item->>'id';
    budget bigint := item->>'budget';
    overhead integer := item->>'overhead';
    session jsonb;
    found record;
    said jsonb[] := '{}';
    owners uuid[] := '{}';
    owner uuid;
    more boolean := false;
BEGIN
    SELECT to_jsonb(s) INTO session FROM public.sessions s WHERE s.session_id = wanted;
    IF session IS NULL THEN
        RETURN NULL;
    END IF;
    FOR found IN
        SELECT c.id, c.role, c.content, c."timestamp", c.turn_id FROM public.conversations c
        WHERE c.session_id = wanted ORDER BY c.id OFFSET (item->>'place')::bigint
    LOOP
        budget := budget - length(found.content) - overhead;
        IF budget < 0 AND cardinality(said) > 0 THEN
            more := true;
            EXIT;
        END IF;
        said := said || jsonb_build_array(
            found.id, found.role, found.content, found."timestamp", found.turn_id);
        IF found.turn_id IS DISTINCT FROM owner THEN
            owner := found.turn_id;
            owners := owners || owner;
        END IF;
    END LOOP;
    RETURN jsonb_build_object('session', session, 'messages', to_jsonb(said), 'more', more,
        'turns', (
            SELECT coalesce(jsonb_agg(to_jsonb(t) ORDER BY t.seq), '[]')
            FROM (SELECT DISTINCT unnest(owners) AS turn_id) o
            JOIN public.turns t ON t.turn_id = o.turn_id));
END $$;

-- A turn's reply_id in the item is its reply's place in the part.
CREATE OR REPLACE FUNCTION public.chatd_import_session(item jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    wanted uuid := item->>'id';
    place bigint := item->>'place';
    made boolean;
    clash text;
    held bigint;
    given public.turns[];
BEGIN
    PERFORM FROM public.chatbots b WHERE b.id = (item->>'chatbot_id')::uuid;
    IF NOT FOUND THEN
        RETURN '{"error": "not_found"}';
    END IF;
    INSERT INTO public.sessions (session_id, chatbot_id, channel, user_id, metadata, created_at)
    VALUES (wanted, (item->>'chatbot_id')::uuid, item->>'channel', item->>'user_id',
            item->'metadata', coalesce((item->>'created_at')::timestamptz, now()))
    ON CONFLICT (session_id) DO NOTHING;
    made := FOUND;
    SELECT array_agg(g ORDER BY g.seq) INTO given
    FROM jsonb_populate_recordset(NULL::public.turns, item->'turns') g;
    SELECT 'it belongs to another chatbot' INTO clash FROM (
        SELECT s.chatbot_id FROM public.sessions s WHERE s.session_id = wanted
        FOR NO KEY UPDATE) s
    WHERE s.chatbot_id <> (item->>'chatbot_id')::uuid;
    SELECT count(*) INTO held FROM public.conversations c WHERE c.session_id = wanted;
    IF clash IS NULL AND held < place THEN
        clash := 'messages before this part are missing';
    END IF;
    IF clash IS NULL THEN
        SELECT 'it went on by itself' INTO clash FROM unnest(given) g
        JOIN public.turns t ON t.session_id = wanted AND t.seq = g.seq
        WHERE t.turn_id <> g.turn_id OR t.run > g.run LIMIT 1;
    END IF;
    IF clash IS NULL THEN
        SELECT 'a turn of it belongs to another session' INTO clash FROM unnest(given) g
        JOIN public.turns t ON t.turn_id = g.turn_id
        WHERE t.session_id <> wanted OR t.seq <> g.seq LIMIT 1;
    END IF;
    IF clash IS NOT NULL THEN
        IF made THEN
            DELETE FROM public.sessions s WHERE s.session_id = wanted;
        END IF;
        RETURN jsonb_build_object('error', 'session_conflict', 'detail', clash);
    END IF;
    INSERT INTO public.conversations (session_id, role, content, "timestamp", turn_id)
    SELECT wanted, m.message->>0, m.message->>1, (m.message->>2)::timestamptz,
        (m.message->>3)::uuid
    FROM jsonb_array_elements(item->'messages') WITH ORDINALITY AS m (message, nth)
    WHERE place + m.nth > held ORDER BY m.nth;
    UPDATE public.turns t SET idempotency_key = NULL FROM unnest(given) g
    WHERE t.session_id = wanted AND t.idempotency_key = g.idempotency_key
        AND t.turn_id <> g.turn_id;
    INSERT INTO public.turns AS t (turn_id, session_id, seq, status, label, idempotency_key,
        request_hash, lease_until, rerunnable, run, reply_id, model, provider, finish_reason,
        error_code, input_tokens, output_tokens, cached_tokens, reasoning_tokens, cost_usd,
        attempts, rating, comment, started_at, finished_at, history_truncated, side)
    SELECT g.turn_id, wanted, g.seq, g.status, g.label, g.idempotency_key,
        g.request_hash, now(), g.rerunnable, g.run, p.id, g.model, g.provider, g.finish_reason,
        g.error_code, g.input_tokens, g.output_tokens, g.cached_tokens, g.reasoning_tokens,
        g.cost_usd, g.attempts, g.rating, g.comment, coalesce(g.started_at, now()), g.finished_at,
        coalesce(g.history_truncated, false), g.side
    FROM unnest(given) g
    LEFT JOIN (
        SELECT c.id, row_number() OVER (ORDER BY c.id) - 1 AS nth FROM (
            SELECT o.id FROM public.conversations o WHERE o.session_id = wanted
            ORDER BY o.id OFFSET place LIMIT jsonb_array_length(item->'messages')) c
        ) p ON p.nth = g.reply_id
    ON CONFLICT (turn_id) DO UPDATE SET status = excluded.status, label = excluded.label,
        idempotency_key = excluded.idempotency_key, request_hash = excluded.request_hash,
        rerunnable = excluded.rerunnable, run = excluded.run,
        reply_id = coalesce(excluded.reply_id, t.reply_id), model = excluded.model,
        provider = excluded.provider, finish_reason = excluded.finish_reason,
        error_code = excluded.error_code, input_tokens = excluded.input_tokens,
        output_tokens = excluded.output_tokens, cached_tokens = excluded.cached_tokens,
        reasoning_tokens = excluded.reasoning_tokens, cost_usd = excluded.cost_usd,
        attempts = excluded.attempts, rating = excluded.rating, comment = excluded.comment,
        started_at = excluded.started_at, finished_at = excluded.finished_at,
        history_truncated = excluded.history_truncated, side = excluded.side;
    RETURN '{}';
END $$;

CREATE OR REPLACE FUNCTION public.chatd_tally_sessions(items jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    answers jsonb[] := array_fill(NULL::jsonb, ARRAY[jsonb_array_length(items)]);
    entry record;
BEGIN
    FOR entry IN
        SELECT i.item, i.place FROM jsonb_array_elements(items) WITH ORDINALITY AS i (item, place)
        ORDER BY i.item->>'id', i.place
    LOOP
        BEGIN
            answers[entry.place] := public.chatd_tally_session(entry.item);
        EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN
            answers[entry.place] := jsonb_build_object('error', 'failed', 'detail', SQLERRM);
        END;
    END LOOP;
    RETURN to_jsonb(answers);
END $$;

CREATE OR REPLACE FUNCTION public.chatd_export_sessions(items jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    answers jsonb[] := array_fill(NULL::jsonb, ARRAY[jsonb_array_length(items)]);
    entry record;
BEGIN
    FOR entry IN
        SELECT i.item, i.place FROM jsonb_array_elements(items) WITH ORDINALITY AS i (item, place)
        ORDER BY i.item->>'id', i.place
    LOOP
        BEGIN
            answers[entry.place] := public.chatd_export_session(entry.item);
        EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN
            answers[entry.place] := jsonb_build_object('error', 'failed', 'detail', SQLERRM);
        END;
    END LOOP;
    RETURN to_jsonb(answers);
END $$;

CREATE OR REPLACE FUNCTION public.chatd_import_sessions(items jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    answers jsonb[] := array_fill(NULL::jsonb, ARRAY[jsonb_array_length(items)]);
    entry record;
BEGIN
    FOR entry IN
        SELECT i.item, i.place FROM jsonb_array_elements(items) WITH ORDINALITY AS i (item, place)
        ORDER BY i.item->>'id', i.place
    LOOP
        BEGIN
            answers[entry.place] := public.chatd_import_session(entry.item);
        EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN
            answers[entry.place] := jsonb_build_object('error', 'failed', 'detail', SQLERRM);
        END;
    END LOOP;
    RETURN to_jsonb(answers);
END $$;

-- What is wrong with this database, each with its cure, as [{"problem", "cure"}]. It names nothing
-- that may be missing, so that `chatd doctor` can run its text in a database without this schema.
CREATE OR REPLACE FUNCTION public.chatd_doctor() RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = '' AS $$
DECLARE
    again constant text := 'run schema.sql again (`chatd migrate`)';
    first constant text := 'run schema.sql (`chatd migrate`)';
    -- Tables, and what they hold.
    wanted constant jsonb := '{
        "chatbots": ["id", "api_key", "model_name", "created_at", "updated_at", "name", "settings"],
        "sessions": ["session_id", "chatbot_id", "created_at", "channel", "user_id", "metadata"],
        "conversations": ["id", "session_id", "role", "content", "timestamp", "turn_id"],
        "turns": ["turn_id", "session_id", "seq", "status", "label", "idempotency_key",
            "request_hash", "lease_until", "rerunnable", "run", "reply_id", "model", "provider",
            "finish_reason", "error_code", "input_tokens", "output_tokens", "cached_tokens",
            "reasoning_tokens", "cost_usd", "attempts", "rating", "comment", "started_at",
            "finished_at", "history_truncated", "stop_asked", "side"],
        "usage_of_erased": ["chatbot_id", "day", "model", "side", "turns", "completed", "failed",
            "stopped", "interrupted", "input_tokens", "output_tokens", "cached_tokens",
            "reasoning_tokens", "cost_usd", "unknown_cost", "rated_up", "rated_down"]}';
    -- Functions, and what they take.
    callable constant jsonb := '{
        "chatd_schema_version": "", "chatd_doctor": "", "chatd_chatbot_json": "public.chatbots",
        "chatd_hash_api_key": "",
        "chatd_turn_json": "uuid", "chatd_add_chatbot": "jsonb", "chatd_update_chatbot": "jsonb",
        "chatd_set_api_key": "jsonb", "chatd_get_chatbot": "jsonb",
        "chatd_get_chatbot_by_key": "jsonb", "chatd_list_chatbots": "jsonb",
        "chatd_remove_chatbot": "jsonb", "chatd_allowed_origins": "jsonb",
        "chatd_create_session": "jsonb", "chatd_get_session": "jsonb",
        "chatd_delete_session": "jsonb", "chatd_list_messages": "jsonb",
        "chatd_history": "uuid, uuid, bigint, integer", "chatd_begin_turn": "jsonb",
        "chatd_begun": "jsonb, uuid, text", "chatd_finish_turn": "jsonb",
        "chatd_begin_turns": "jsonb", "chatd_finish_turns": "jsonb", "chatd_renew_turns": "jsonb",
        "chatd_stop_turn": "jsonb", "chatd_running_turn": "jsonb",
        "chatd_get_turn": "jsonb", "chatd_rate_turn": "jsonb", "chatd_sweep": "jsonb",
        "chatd_list_sessions": "jsonb", "chatd_tally_session": "jsonb",
        "chatd_export_session": "jsonb", "chatd_import_session": "jsonb",
        "chatd_tally_sessions": "jsonb", "chatd_export_sessions": "jsonb",
        "chatd_import_sessions": "jsonb", "chatd_settle_turn": "jsonb",
        "chatd_erase_locked": "uuid[]", "chatd_idle": "uuid, timestamptz",
        "chatd_erase_idle_sessions": "jsonb",
        "chatd_usage": "uuid, uuid, timestamptz, timestamptz", "chatd_usage_totals": "jsonb"}';
    -- The beginnings of the MD5 digests of what functions do; a test says what they must be.
    bodies constant jsonb := '{
        "chatd_add_chatbot": "958046f4", "chatd_allowed_origins": "4ee386b7",
        "chatd_begin_turn": "6326eaf8", "chatd_begin_turns": "d06f1234",
        "chatd_begun": "0cae5ec8", "chatd_chatbot_json": "aef67f73",
        "chatd_create_session": "211a2bf4", "chatd_delete_session": "e056461c",
        "chatd_erase_idle_sessions": "22f1a610", "chatd_erase_locked": "1c2b7691",
        "chatd_export_session": "0762ea92", "chatd_export_sessions": "24dbab57",
        "chatd_finish_turn": "71c4e7f0", "chatd_finish_turns": "c260f87b",
        "chatd_get_chatbot": "34caf171", "chatd_get_chatbot_by_key": "32b81831",
        "chatd_get_session": "cc08abcf", "chatd_get_turn": "2ea1b448",
        "chatd_hash_api_key": "f90e5a86", "chatd_history": "1bebeeb6", "chatd_idle": "a6e8cf47",
        "chatd_import_session": "ee79b026", "chatd_import_sessions": "400458c5",
        "chatd_list_chatbots": "27ac95e8", "chatd_list_messages": "fc9170b6",
        "chatd_list_sessions": "a10e03a7", "chatd_rate_turn": "4af26e94",
        "chatd_remove_chatbot": "57e0afa4", "chatd_renew_turns": "25a17fbb",
        "chatd_running_turn": "34d26574", "chatd_schema_version": "b4b2127a",
        "chatd_set_api_key": "35c4a805", "chatd_settle_turn": "bdf6b85f",
        "chatd_stop_turn": "ec7d3fbd", "chatd_sweep": "67de527f",
        "chatd_tally_session": "942e1c10", "chatd_tally_sessions": "bb5699fb",
        "chatd_turn_json": "734030fb", "chatd_update_chatbot": "578e6133",
        "chatd_usage": "e4f64c47", "chatd_usage_totals": "f839ea58"}';
    -- Indexes, as pg_get_indexdef tells them.
    indexes constant jsonb := '{
        "sessions_by_chatbot": "CREATE INDEX sessions_by_chatbot ON public.sessions USING btree (chatbot_id, session_id)",
        "sessions_by_age": "CREATE INDEX sessions_by_age ON public.sessions USING btree (chatbot_id, created_at, session_id)",
        "sessions_of_user": "CREATE INDEX sessions_of_user ON public.sessions USING btree (user_id, session_id) WHERE (user_id IS NOT NULL)",
        "conversations_of_session": "CREATE INDEX conversations_of_session ON public.conversations USING btree (session_id, id)",
        "turns_of_session": "CREATE UNIQUE INDEX turns_of_session ON public.turns USING btree (session_id, seq)",
        "one_running_turn": "CREATE UNIQUE INDEX one_running_turn ON public.turns USING btree (session_id) WHERE (status = ''running''::text)",
        "one_turn_per_key": "CREATE UNIQUE INDEX one_turn_per_key ON public.turns USING btree (session_id, idempotency_key) WHERE (idempotency_key IS NOT NULL)",
        "running_leases": "CREATE INDEX running_leases ON public.turns USING btree (lease_until) WHERE (status = ''running''::text)",
        "turns_by_start": "CREATE INDEX turns_by_start ON public.turns USING btree (started_at)",
        "usage_of_erased_day": "CREATE UNIQUE INDEX usage_of_erased_day ON public.usage_of_erased USING btree (chatbot_id, day, COALESCE(model, ''''::text), COALESCE(side, ''''::text))"}';
    ours oid[];
    public_roles name[];
    our_roles name[];
    sequence oid := to_regclass('public.conversations_id_seq');
    version integer;
    unhashed bigint;
    found jsonb[] := '{}';
    whole boolean;
BEGIN
    SELECT coalesce(array_agg(c.oid), '{}') INTO ours FROM pg_class c
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
        AND wanted ? c.relname::text;
    SELECT array_agg(r.rolname) INTO public_roles FROM pg_roles r
    WHERE r.rolname IN ('anon', 'authenticated');
    public_roles := array_prepend('public', public_roles);
    SELECT array_agg(r.rolname) INTO our_roles FROM pg_roles r
    WHERE r.rolname IN ('service_role', current_user);

    -- What is there.
    IF cardinality(ours) = 0 THEN
        RETURN jsonb_build_array(jsonb_build_object(
            'problem', 'there are none of chatd''s tables here', 'cure', first));
    END IF;
    IF to_regprocedure('public.chatd_schema_version()') IS NULL THEN
        found := found || jsonb_build_object(
            'problem', 'schema.sql has not been run here, or is of an older version', 'cure', again);
    ELSIF has_function_privilege('public.chatd_schema_version()', 'EXECUTE') THEN
        EXECUTE 'SELECT public.chatd_schema_version()' INTO version;
        IF version <> 5 THEN
            found := found || jsonb_build_object('problem',
                format('the database has schema version %s, and this is version 5', version),
                'cure', again);
        END IF;
    END IF;
    found := found || ARRAY(
        SELECT jsonb_build_object('problem', format('the table public.%s is missing', w.key),
            'cure', again)
        FROM jsonb_each(wanted) w WHERE to_regclass('public.' || w.key) IS NULL);
    found := found || ARRAY(
        SELECT jsonb_build_object('problem', format('the table public.%s lacks the columns %s',
            c.relname, string_agg(n.name, ', ' ORDER BY n.name)), 'cure',
            CASE WHEN bool_and((c.relname, n.name) <> ('turns', 'turn_id')
                AND c.relname <> 'usage_of_erased' AND n.name IN
                ('name', 'settings', 'channel', 'user_id', 'metadata', 'turn_id',
                'history_truncated', 'stop_asked', 'side'))
            THEN again ELSE 'restore the table from a backup' END)
        FROM pg_class c, jsonb_array_elements_text(wanted->c.relname::text) AS n (name)
        WHERE c.oid = ANY (ours) AND NOT EXISTS (
            SELECT FROM pg_attribute a
            WHERE a.attrelid = c.oid AND a.attname = n.name AND NOT a.attisdropped)
        GROUP BY c.relname);
    whole := cardinality(found) = 0;
    found := found || ARRAY(
        SELECT jsonb_build_object('problem',
            'functions are missing: ' || string_agg(w.key, ', ' ORDER BY w.key), 'cure', again)
        FROM jsonb_each_text(callable) w
        WHERE to_regprocedure(format('public.%s(%s)', w.key, w.value)) IS NULL
        HAVING count(*) > 0);
    IF version = 5 THEN
        found := found || ARRAY(
            SELECT jsonb_build_object('problem',
                format('%s is not what chatd makes it', p.oid::regprocedure), 'cure', again)
            FROM pg_proc p
            WHERE p.pronamespace = 'public'::regnamespace AND bodies ? p.proname::text
                AND left(md5(p.prosrc), 8) <> bodies->>p.proname::text
            ORDER BY p.oid::regprocedure::text);
    END IF;

    -- Who gets in.
    found := found || ARRAY(
        SELECT jsonb_build_object(
            'problem', format('row-level security is off on public.%I', c.relname),
            'cure', format('ALTER TABLE public.%I ENABLE ROW LEVEL SECURITY;', c.relname))
        FROM pg_class c WHERE c.oid = ANY (ours) AND NOT c.relrowsecurity ORDER BY c.relname);
    found := found || ARRAY(
        SELECT jsonb_build_object(
            'problem', format('the policy %I lets %s %s', p.polname, r.names, CASE
                WHEN c.relname = 'chatbots' AND p.polcmd IN ('r', '*') THEN 'read the API keys'
                ELSE CASE p.polcmd WHEN 'r' THEN 'read' WHEN 'a' THEN 'add to' WHEN 'w'
                    THEN 'change' WHEN 'd' THEN 'delete from' ELSE 'read and change' END
                    || ' public.' || c.relname END),
            'cure', format('DROP POLICY %I ON public.%I;', p.polname, c.relname))
        FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid,
            LATERAL (
                SELECT string_agg(n.name, ', ' ORDER BY n.name) AS names
                FROM unnest(public_roles) AS n (name)
                WHERE 0 = ANY (p.polroles) AND n.name = 'public' OR n.name <> 'public' AND EXISTS (
                    SELECT FROM unnest(p.polroles) AS o (oid)
                    WHERE o.oid <> 0 AND pg_has_role(n.name, o.oid, 'USAGE'))) r
        WHERE c.oid = ANY (ours) AND p.polpermissive AND r.names IS NOT NULL
        ORDER BY c.relname, p.polname);
    found := found || ARRAY(
        SELECT jsonb_build_object(
            'problem', format('%s may %s %s', g.who, string_agg(DISTINCT g.what, ', '), g.target),
            'cure', format('REVOKE ALL ON %s FROM %s;', g.target, g.who))
        FROM (
            SELECT format('TABLE public.%I', c.relname) AS target, a.grantee, a.privilege_type
            FROM pg_class c, aclexplode(c.relacl) a WHERE c.oid = ANY (ours)
            UNION ALL
            SELECT format('TABLE public.%I', c.relname), a.grantee, a.privilege_type
            FROM pg_class c JOIN pg_attribute t ON t.attrelid = c.oid, aclexplode(t.attacl) a
            WHERE c.oid = ANY (ours)
            UNION ALL
            SELECT 'SEQUENCE public.conversations_id_seq', a.grantee, a.privilege_type
            FROM pg_class c, aclexplode(c.relacl) a WHERE c.oid = sequence
            ) AS o (target, grantee, what),
            LATERAL (SELECT o.target, o.what, CASE o.grantee WHEN 0 THEN 'public'
                ELSE (SELECT r.rolname FROM pg_roles r WHERE r.oid = o.grantee) END) AS g (target, what, who)
        WHERE g.who = ANY (public_roles) GROUP BY g.target, g.who ORDER BY g.target, g.who);
    found := found || ARRAY(
        SELECT jsonb_build_object(
            'problem', format('%s may call %s', g.who, string_agg(g.function, ', ')),
            'cure', format('REVOKE ALL ON FUNCTION %s FROM %s;', string_agg(g.function, ', '), g.who))
        FROM (
            SELECT DISTINCT p.oid::regprocedure::text, CASE a.grantee WHEN 0 THEN 'public'
                ELSE (SELECT r.rolname FROM pg_roles r WHERE r.oid = a.grantee) END
            FROM pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
            WHERE p.pronamespace = 'public'::regnamespace AND p.proname LIKE 'chatd\_%'
            ) AS g (function, who)
        WHERE g.who = ANY (public_roles) GROUP BY g.who);
    found := found || ARRAY(
        WITH RECURSIVE shown (view, shows) AS (
            SELECT r.ev_class, d.refobjid FROM pg_rewrite r JOIN pg_depend d
                ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
            WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY (ours)
            UNION
            SELECT r.ev_class, s.shows FROM shown s JOIN pg_depend d
                ON d.refclassid = 'pg_class'::regclass AND d.refobjid = s.view
                AND d.classid = 'pg_rewrite'::regclass
            JOIN pg_rewrite r ON r.oid = d.objid)
        SELECT jsonb_build_object(
            'problem', format('the view %s shows %s to %s, past row-level security',
                v.oid::regclass, s.tables, p.names),
            'cure', format('REVOKE ALL ON %s FROM %s;', v.oid::regclass,
                array_to_string(public_roles, ', ')))
        FROM pg_class v, LATERAL (
                SELECT string_agg(DISTINCT s.shows::regclass::text, ', ') FROM shown s
                WHERE s.view = v.oid) AS s (tables),
            LATERAL (
                SELECT string_agg(n.name, ', ' ORDER BY n.name) FROM unnest(public_roles) AS n (name)
                WHERE has_any_column_privilege(n.name, v.oid, 'SELECT')) AS p (names)
        WHERE v.relkind IN ('v', 'm') AND s.tables IS NOT NULL AND p.names IS NOT NULL
            AND NOT coalesce(v.reloptions && ARRAY['security_invoker=true', 'security_invoker=on',
                'security_invoker=1', 'security_invoker=yes'], false)
        ORDER BY v.oid::regclass::text);
    found := found || ARRAY(
        SELECT jsonb_build_object(
            'problem', format('%s, with its owner''s rights, lets %s use chatd''s tables',
                p.oid::regprocedure, w.names),
            'cure', format('REVOKE ALL ON ROUTINE %s FROM %s;', p.oid::regprocedure,
                array_to_string(public_roles, ', ')))
        FROM pg_proc p, LATERAL (
            SELECT string_agg(n.name, ', ' ORDER BY n.name) AS names
            FROM unnest(public_roles) AS n (name)
            WHERE has_function_privilege(n.name, p.oid, 'EXECUTE')) w
        WHERE p.pronamespace = 'public'::regnamespace AND p.prosecdef AND w.names IS NOT NULL
            AND p.proname NOT LIKE 'chatd\_%' AND p.prokind IN ('f', 'p')
            AND p.prorettype <> 'trigger'::regtype AND pg_get_functiondef(p.oid)
                ~ ('(\mpublic\.|[^.\w])(chatd_\w+|' || (SELECT string_agg(k, '|') FROM jsonb_object_keys(wanted) k) || ')\M')
        ORDER BY p.oid::regprocedure::text);
    found := found || ARRAY(
        SELECT jsonb_build_object(
            'problem', format('%s is not held by row-level security', r.rolname),
            'cure', format('ALTER ROLE %I %s;', r.rolname, CASE WHEN r.rolsuper
                THEN 'NOSUPERUSER NOBYPASSRLS' ELSE 'NOBYPASSRLS' END))
        FROM pg_roles r
        WHERE r.rolname = ANY (public_roles) AND (r.rolbypassrls OR r.rolsuper)
        ORDER BY r.rolname);
    -- Direct memberships, by which a role is taken on that may do something.
    found := found || ARRAY(
        SELECT jsonb_build_object(
            'problem', format('%s may become %s, which may use chatd''s tables', u.rolname, o.rolname),
            'cure', format('REVOKE %I FROM %I;', o.rolname, u.rolname))
        FROM pg_auth_members m JOIN pg_roles u ON u.oid = m.member JOIN pg_roles o ON o.oid = m.roleid
        WHERE u.rolname = ANY (public_roles) AND NOT o.rolname = ANY (public_roles) AND EXISTS (
            SELECT FROM pg_roles r, unnest(ours) AS c (oid), unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) AS w (what)
            WHERE pg_has_role(o.oid, r.oid, 'MEMBER')
                AND (r.rolsuper OR has_any_column_privilege(r.oid, c.oid, w.what)))
        ORDER BY u.rolname, o.rolname);
    found := found || ARRAY(
        SELECT jsonb_build_object('problem',
            format('%s runs with its owner''s rights', p.oid::regprocedure),
            'cure', format('ALTER FUNCTION %s SECURITY INVOKER;', p.oid::regprocedure))
        FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace
            AND p.proname LIKE 'chatd\_%' AND p.prosecdef);
    found := found || ARRAY(
        SELECT jsonb_build_object('problem',
            format('%s does not pin its search_path', p.oid::regprocedure),
            'cure', format('ALTER FUNCTION %s SET search_path = '''';', p.oid::regprocedure))
        FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace AND p.proname LIKE 'chatd\_%'
            AND NOT coalesce(p.proconfig @> ARRAY['search_path=""'], false));

    -- Who is kept out that must get in.
    found := found || ARRAY(
        SELECT jsonb_build_object('problem', format('%s may not use the schema public', r.name),
            'cure', format('GRANT USAGE ON SCHEMA public TO %I;', r.name))
        FROM unnest(our_roles) AS r (name) WHERE NOT has_schema_privilege(r.name, 'public', 'USAGE'));
    found := found || ARRAY(
        SELECT jsonb_build_object(
            'problem', format('%s may not %s public.%I', r.name, string_agg(n.what, ', '), c.relname),
            'cure', format('GRANT %s ON TABLE public.%I TO %I;',
                string_agg(n.what, ', '), c.relname, r.name))
        FROM unnest(our_roles) AS r (name), pg_class c,
            unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS n (what)
        WHERE c.oid = ANY (ours) AND NOT has_table_privilege(r.name, c.oid, n.what)
        GROUP BY r.name, c.relname ORDER BY r.name, c.relname);
    found := found || ARRAY(
        SELECT jsonb_build_object(
            'problem', format('%s may not use public.conversations_id_seq', r.name), 'cure',
            format('GRANT USAGE ON SEQUENCE public.conversations_id_seq TO %I;', r.name))
        FROM unnest(our_roles) AS r (name)
        WHERE sequence IS NOT NULL AND NOT has_sequence_privilege(r.name, sequence, 'USAGE'));
    found := found || ARRAY(
        SELECT jsonb_build_object(
            'problem', format('%s may not call %s', r.name, string_agg(p.oid::regprocedure::text, ', ')),
            'cure', format('GRANT EXECUTE ON FUNCTION %s TO %I;',
                string_agg(p.oid::regprocedure::text, ', '), r.name))
        FROM unnest(our_roles) AS r (name), pg_proc p
        WHERE p.pronamespace = 'public'::regnamespace AND callable ? p.proname::text
            AND NOT has_function_privilege(r.name, p.oid, 'EXECUTE')
        GROUP BY r.name ORDER BY r.name);
    found := found || ARRAY(
        SELECT jsonb_build_object(
            'problem', 'row-level security hides every row from service_role',
            'cure', 'ALTER ROLE service_role BYPASSRLS;')
        FROM pg_roles r
        WHERE r.rolname = 'service_role' AND NOT r.rolbypassrls AND NOT r.rolsuper);
    found := found || ARRAY(
        SELECT jsonb_build_object(
            'problem', format('row-level security hides the rows of public.%I from %s',
                c.relname, current_user),
            'cure', CASE WHEN c.relforcerowsecurity
                    AND pg_has_role(c.relowner, 'USAGE')
                THEN format('ALTER TABLE public.%I NO FORCE ROW LEVEL SECURITY;', c.relname)
                ELSE format('ALTER ROLE %I BYPASSRLS;', current_user) END)
        FROM pg_class c
        WHERE c.oid = ANY (ours) AND current_user <> 'service_role' AND row_security_active(c.oid)
        ORDER BY c.relname);

    -- What keeps rows right, and queries quick.
    IF whole THEN
        found := found || ARRAY(
            SELECT jsonb_build_object('problem', CASE
                    WHEN x.indexrelid IS NULL THEN format('the index %s is missing', w.key)
                    WHEN NOT x.indisvalid OR NOT x.indisready
                        THEN format('the index %s is not valid', w.key)
                    ELSE format('the index %s is not the one that chatd makes', w.key) END,
                'cure', CASE WHEN i.oid IS NULL THEN '' ELSE format('DROP INDEX public.%s; then ',
                    w.key) END || again)
            FROM jsonb_each_text(indexes) w
            LEFT JOIN pg_class i ON i.relname = w.key AND i.relnamespace = 'public'::regnamespace
            LEFT JOIN pg_index x ON x.indexrelid = i.oid
            WHERE x.indexrelid IS NULL OR NOT x.indisvalid OR NOT x.indisready
                OR pg_get_indexdef(i.oid) <> w.value);
        found := found || ARRAY(
            SELECT jsonb_build_object(
                'problem', format('public.%s.%s is not unique', k.tab, k.col), 'cure',
                format('ALTER TABLE public.%s ADD %s (%s);', k.tab, k.kind, k.col))
            FROM (VALUES ('chatbots', 'id', 'PRIMARY KEY'), ('chatbots', 'api_key', 'UNIQUE'),
                ('sessions', 'session_id', 'PRIMARY KEY'), ('conversations', 'id', 'PRIMARY KEY'),
                ('turns', 'turn_id', 'PRIMARY KEY')) AS k (tab, col, kind)
            WHERE NOT EXISTS (
                SELECT FROM pg_index x
                JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attname = k.col
                WHERE x.indrelid = to_regclass('public.' || k.tab) AND x.indisunique
                    AND x.indisvalid AND x.indimmediate AND x.indpred IS NULL AND x.indnkeyatts = 1
                    AND x.indkey[0] = a.attnum));
        found := found || ARRAY(
            SELECT jsonb_build_object('problem', CASE WHEN f.oid IS NULL
                    THEN format('public.%s.%s refers to no row of public.%s', k.tab, k.col, k.other)
                    ELSE format('removing from public.%s is stopped by public.%s', k.other, k.tab) END,
                'cure', format('ALTER TABLE public.%s %sADD FOREIGN KEY (%s) REFERENCES public.%s '
                    '(%s) ON DELETE CASCADE;', k.tab, CASE WHEN f.oid IS NULL THEN '' ELSE
                    format('DROP CONSTRAINT %I, ', f.conname) END, k.col, k.other, k.other_col))
            FROM (VALUES ('sessions', 'chatbot_id', 'chatbots', 'id'),
                ('conversations', 'session_id', 'sessions', 'session_id'),
                ('turns', 'session_id', 'sessions', 'session_id'),
                ('usage_of_erased', 'chatbot_id', 'chatbots', 'id')) AS k (tab, col, other, other_col)
            LEFT JOIN pg_constraint f ON f.contype = 'f'
                AND f.conrelid = to_regclass('public.' || k.tab)
                AND f.confrelid = to_regclass('public.' || k.other)
            WHERE f.confdeltype IS DISTINCT FROM 'c');
    END IF;
    IF to_regclass('public.chatbots') IS NOT NULL THEN
        found := found || ARRAY(
            SELECT jsonb_build_object('problem', 'API keys are stored as they are written: the '
                'trigger chatd_hash_api_key is disabled', 'cure',
                'ALTER TABLE public.chatbots ENABLE TRIGGER chatd_hash_api_key;')
            FROM pg_trigger t WHERE t.tgrelid = to_regclass('public.chatbots')
                AND t.tgname = 'chatd_hash_api_key' AND t.tgenabled NOT IN ('O', 'A')
            UNION ALL
            SELECT jsonb_build_object('problem', 'API keys are stored as they are written: the '
                'trigger chatd_hash_api_key is missing', 'cure', again)
            WHERE NOT EXISTS (
                SELECT FROM pg_trigger t WHERE t.tgrelid = to_regclass('public.chatbots')
                    AND t.tgname = 'chatd_hash_api_key'));
        IF has_table_privilege('public.chatbots', 'SELECT') THEN
            EXECUTE 'SELECT count(*) FROM public.chatbots
                WHERE api_key !~ ''^sha256:[0-9a-f]{64}$''' INTO unhashed;
            IF unhashed > 0 THEN
                found := found || jsonb_build_object('problem',
                    format('%s API keys are stored unhashed', unhashed), 'cure', again);
            END IF;
        END IF;
    END IF;
    RETURN to_jsonb(found);
END $$;

-- Who may.

ALTER TABLE public.chatbots ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.sessions ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.conversations ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.turns ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.usage_of_erased ENABLE ROW LEVEL SECURITY;

DO $$
DECLARE
    nobody text;
    made regprocedure;
BEGIN
    FOREACH nobody IN ARRAY ARRAY['public', 'anon', 'authenticated'] LOOP
        IF nobody = 'public' OR EXISTS (SELECT FROM pg_roles WHERE rolname = nobody) THEN
            EXECUTE format('REVOKE ALL ON public.chatbots, public.sessions, public.conversations,
                public.turns, public.usage_of_erased FROM %s', nobody);
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
            public.conversations, public.turns, public.usage_of_erased TO service_role;
        GRANT USAGE ON SEQUENCE public.conversations_id_seq TO service_role;
        FOR made IN SELECT p.oid::regprocedure FROM pg_proc p
            WHERE p.pronamespace = 'public'::regnamespace AND p.proname LIKE 'chatd\_%' LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO service_role', made);
        END LOOP;
    END IF;
END $$;

NOTIFY pgrst, 'reload schema';

COMMIT;
