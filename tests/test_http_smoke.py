from tests.support import Served


async def test_a_turn_over_a_socket(served: Served) -> None:
    bot = await served.add_bot()
    session = await served.session(bot)
    answer = await served.chat(bot, session, "hi")
    assert answer.status == 200
    assert answer.json["response"] == "You said: hi"
    assert await served.transcript(bot, session) == [("user", "hi"), ("assistant", "You said: hi")]
